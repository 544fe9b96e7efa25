//! What is made, what is refused, and that nothing stays of what was not made.
#![allow(clippy::unwrap_used)]

use qcow2_blockdev::{
    CreateFailure, CreateFailureKind as K, CreateHow, KeyValues, NewOptions, NewTarget, NoSecret,
    OptionErrorKind, Secrets, Unfinished, create, new_image_format,
};
use qcow2_core::{ImageFormat, Refusal};
use qcow2_io::OpenFiles;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Makes `image`; a `@` in `options` is this folder.
    fn make(&self, format: &ImageFormat, options: &str, how: &CreateHow<'_>) -> Result<(), CreateFailure> {
        let list = options.replace('@', &format!("{}/", self.0.path().display()));
        let options = NewOptions::parse(format, &KeyValues::parse_image_options(&[list]))?;
        create(&NewTarget::File(self.path("image").display().to_string()), &options, how)
    }
}

fn secrets() -> Secrets {
    let mut secrets = Secrets::default();
    secrets.define("secret,id=key,data=sesame").unwrap();
    secrets
}

#[test]
fn each_format_is_made() {
    let how = CreateHow::new().with_secrets(&secrets());
    for (format, options, start, len) in [
        (ImageFormat::Raw, "size=3M,preallocation=full", &[0; 4], 3 << 20),
        (ImageFormat::Qcow2, "size=3M,cluster_size=4k", b"QFI\xfb", 3 * 4096 + 2 * 8),
        (ImageFormat::Luks, "size=3M,key-secret=key,iter-time=10", b"LUKS", (3 << 20) + 2_068_480),
    ] {
        let folder = Folder::new();
        folder.make(&format, options, &how).unwrap();
        let bytes = fs::read(folder.path("image")).unwrap();
        assert_eq!((&bytes[..4], bytes.len()), (&start[..], len), "{format:?}");
    }
    let folder = Folder::new();
    folder.make(&ImageFormat::Qcow2, "size=1M,data_file=@data", &how).unwrap();
    assert_eq!(fs::metadata(folder.path("data")).unwrap().len(), 1 << 20);
}

/// Refused options leave no file, and one that was there as it is.
#[test]
fn refused_options_touch_nothing() {
    let qcow2 = |options: &str, expected: fn(&K) -> bool| (ImageFormat::Qcow2, options.to_owned(), expected);
    let cases = [
        qcow2("size=1M,cluster_size=3", |kind| matches!(kind, K::Refused(Refusal::ClusterSize(3)))),
        qcow2("size=1M,data_file=@data,compat=v2", |kind| {
            matches!(kind, K::Refused(Refusal::DataFileNeedsVersion3))
        }),
        qcow2(
            "size=1M,compat=v9",
            |kind| matches!(kind, K::Option(error) if error.kind == OptionErrorKind::NotAChoice),
        ),
        qcow2(
            "backing_file=b,backing_fmt=ext4",
            |kind| matches!(kind, K::Option(error) if error.option == "backing_fmt"),
        ),
        qcow2("encrypt.format=luks", |kind| matches!(kind, K::SecretNotNamed("encrypt.key-secret"))),
        qcow2(
            "encrypt.format=luks,encrypt.key-secret=x",
            |kind| matches!(kind, K::NoSecret(NoSecret::Missing(id)) if id == "x"),
        ),
        qcow2("encrypt.format=aes,encryption=on", |kind| matches!(kind, K::EncryptedTwice)),
        qcow2("encrypt.iter-time=10", |kind| matches!(kind, K::NoEncryptFormat)),
        qcow2("encryption=on,encrypt.iter-time=1", |kind| matches!(kind, K::NotWithAes("encrypt.iter-time"))),
        qcow2(
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.cipher-alg=cast5-128",
            |kind| matches!(kind, K::Cipher { spec, .. } if spec.alg.name() == "cast5-128"),
        ),
        qcow2("extent_size_hint=4G", |kind| matches!(kind, K::ExtentSizeHint(n) if *n == 4 << 30)),
        (ImageFormat::Raw, "preallocation=metadata".to_owned(), |kind| {
            matches!(kind, K::Refused(Refusal::RawMetadataPreallocation))
        }),
        (ImageFormat::Luks, "size=8E,key-secret=key".to_owned(), |kind| {
            matches!(kind, K::Refused(Refusal::SizeTooLarge(_)))
        }),
    ];
    for (format, options, expected) in cases {
        for before in [None, Some("precious")] {
            let folder = Folder::new();
            before.iter().for_each(|content| fs::write(folder.path("image"), content).unwrap());
            let how = CreateHow::new().with_secrets(&secrets());
            let failure = folder.make(&format, &options, &how).unwrap_err();
            assert!(expected(failure.kind()), "{options}: {failure:?}");
            assert_eq!(failure.format(), &format);
            match before {
                None => assert!(folder.names().is_empty(), "{options}: {:?}", folder.names()),
                Some(content) => assert_eq!(fs::read_to_string(folder.path("image")).unwrap(), content),
            }
        }
    }
}

/// The data file is prepared by then, and goes too.
#[test]
fn an_image_in_use_leaves_no_data_file() {
    let folder = Folder::new();
    fs::write(folder.path("image"), "precious").unwrap();
    let files = OpenFiles::default();
    let _held = files.hold_path(&folder.path("image"), "the source").unwrap();
    let how = CreateHow::new().among(&files);
    let failure = folder.make(&ImageFormat::Qcow2, "size=1M,data_file=@data", &how).unwrap_err();
    assert!(matches!(failure.kind(), K::File { .. }), "{failure:?}");
    assert_eq!(folder.names(), ["image"]);
    assert_eq!(fs::read_to_string(folder.path("image")).unwrap(), "precious");
}

#[test]
fn what_cannot_be_written_goes_and_an_old_file_is_emptied() {
    let name = format!("size=1M,backing_fmt=raw,backing_file={}", "x".repeat(1024));
    for before in [false, true] {
        let folder = Folder::new();
        if before {
            fs::write(folder.path("image"), "old").unwrap();
        }
        let failure = folder.make(&ImageFormat::Qcow2, &name, &CreateHow::new()).unwrap_err();
        assert!(matches!(failure.kind(), K::Name { backing: Some(_), .. }), "{failure:?}");
        assert_eq!(folder.names(), if before { &["image"][..] } else { &[] });
        assert!(!before || fs::read(folder.path("image")).unwrap().is_empty());
    }
}

#[test]
fn files_are_unfinished_until_somebody_finishes_them() {
    for finished in [false, true] {
        let (folder, unfinished) = (Folder::new(), Unfinished::default());
        let how = CreateHow::new().with_unfinished(&unfinished);
        folder.make(&ImageFormat::Qcow2, "size=1M,data_file=@data", &how).unwrap();
        if finished {
            unfinished.finish();
        }
        unfinished.discard();
        assert_eq!(folder.names(), if finished { &["data", "image"][..] } else { &[] });
    }
}

#[test]
fn formats_of_new_images() {
    assert_eq!(new_image_format("luks").unwrap(), ImageFormat::Luks);
    let refused = |name: &str| new_image_format(name).unwrap_err();
    assert!(matches!(refused("quorum").kind(), K::NoCreation));
    assert!(matches!(refused("vmdk").kind(), K::UnknownFormat));
    assert_eq!(
        refused("ext4").to_string(),
        "no ext4 image is made: the formats of new images are qcow2, raw and luks"
    );
}
