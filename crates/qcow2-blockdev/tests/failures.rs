//! What is not opened, and the kind of failure that says so.
#![allow(clippy::unwrap_used)]

use qcow2_blockdev::{
    ChainFiles, Driver, FailureKind, Follow, ImageName, KeyError, Keys, Naming, NoSecret, OpenFailure,
    OpenOptions, OptionErrorKind, Secrets, TuningError, Warning, WindowError, open, open_bytes,
    open_snapshot,
};
use qcow2_core::{CreateOptions, ImageFormat, ResolveError};
use qcow2_io::{Create, OpenErrorKind, OpenFile, SourceError};
use qcow2_ops::{ChainError, CommitOptions, Inline, Silent, commit};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder with images in it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes an image of 1 MiB on `backing`, as it is named there.
    fn image(&self, name: &str, backing: Option<(&str, &str)>) -> String {
        image_at(&self.path(name), backing)
    }
}

fn image_at(path: &Path, backing: Option<(&str, &str)>) -> String {
    let storage = OpenFile::writable().with_create(Create::Truncate).open(path).unwrap();
    let mut options = CreateOptions::new(1 << 20);
    if let Some((name, format)) = backing {
        options = options.with_backing(name, format);
    }
    qcow2_core::create(&storage, None, &options).unwrap();
    path.to_str().unwrap().to_owned()
}

fn all() -> OpenOptions {
    OpenOptions::new().with_follow(Follow::All)
}

#[track_caller]
fn refused(typed: &str, is_list: bool, how: &OpenOptions) -> OpenFailure {
    let opened =
        ImageName::parse(typed, &Naming::default().as_list(is_list)).and_then(|name| open(&name, how));
    let failure = opened.map(|_| ()).unwrap_err();
    assert_eq!(failure.name(), typed);
    assert!(failure.to_string().contains(&format!("'{typed}'")), "{failure}");
    failure
}

#[track_caller]
fn refused_list(options: &str) -> FailureKind {
    refused(options, true, &all()).into_kind()
}

#[test]
fn files_that_do_not_open() {
    let folder = Folder::new();
    let missing = folder.path("none").to_str().unwrap().to_owned();
    let FailureKind::File { path, error } = refused(&missing, false, &all()).into_kind() else {
        panic!("another kind")
    };
    assert_eq!(path, missing);
    assert!(matches!(*error, SourceError::Open(error) if error.kind() == OpenErrorKind::NotFound));
    let directory = folder.path(".").to_str().unwrap().to_owned();
    let FailureKind::File { error, .. } = refused(&directory, false, &all()).into_kind() else {
        panic!("another kind")
    };
    assert!(matches!(*error, SourceError::Open(error) if error.kind() == OpenErrorKind::NotRegular));
    let image = folder.image("a", None);
    let device = refused(&format!("host_device:{image}"), false, &all()).into_kind();
    assert!(matches!(device, FailureKind::NotADevice { path, .. } if path == image));
    let device = refused(&format!("host_device:{missing}"), false, &all()).into_kind();
    assert!(
        matches!(device, FailureKind::NoDevice { path, error } if path == missing && error.code() == Some(2))
    );
    let server = refused(&format!("nbd+unix:///x?socket={missing}"), false, &all()).into_kind();
    assert!(matches!(server, FailureKind::Connect(_)));
}

#[cfg(target_os = "linux")]
#[test]
fn a_locked_image_says_which_lock() {
    let folder = Folder::new();
    let path = folder.image("a", None);
    let name = ImageName::parse(&path, &Naming::default()).unwrap();
    let opened = open(&name, &all().writable()).unwrap();
    let failure = refused(&path, false, &all());
    assert!(failure.lock_conflict().is_some(), "{failure}");
    open(&name, &all().with_force_share(true)).unwrap();
    drop(opened);
    open(&name, &all()).unwrap();
}

#[test]
fn options_that_a_node_does_not_take() {
    let folder = Folder::new();
    let image = folder.image("a", None);
    let on = |options: &str| refused_list(&format!("{options},file.filename={image}"));
    assert!(matches!(
        on("driver=qcow2,size=1"),
        FailureKind::UnknownOption { driver: Driver::Qcow2, option } if option == "size"
    ));
    assert!(matches!(
        on("driver=raw,file.nope=1"),
        FailureKind::UnknownOption { driver: Driver::File, option } if option == "nope"
    ));
    assert!(matches!(
        on("driver=qcow2,lazy-refcounts=maybe"),
        FailureKind::Tuning(TuningError::Option(error)) if error.kind == OptionErrorKind::NotASwitch
    ));
    assert!(matches!(
        on("driver=qcow2,cache-size=1M,l2-cache-size=2M"),
        FailureKind::Tuning(TuningError::LargerThanAll("l2-cache-size"))
    ));
    assert!(matches!(
        on("driver=raw,file.locking=perhaps"),
        FailureKind::Option(error) if error.option == "locking" && error.kind == OptionErrorKind::NotAChoice
    ));
    assert!(matches!(
        on("driver=raw,offset=1G"),
        FailureKind::Window(WindowError::OffsetPastEnd { offset: 0x4000_0000, .. })
    ));
    let other = folder.image("b", None);
    assert!(matches!(on(&format!("driver=qcow2,data-file.filename={other}")), FailureKind::NoDataFile));
    // That it is not there is said first.
    assert!(matches!(on("driver=qcow2,data-file.filename=x"), FailureKind::Engine(_)));
    assert!(matches!(
        on("driver=raw,backing.driver=raw,backing.file.filename=x"),
        FailureKind::NoBackingFiles
    ));
    let queued = "driver=qcow2,file.aio=native";
    assert!(matches!(on(queued), FailureKind::QueuedThroughCache));
}

#[test]
fn what_is_not_to_be_written_to() {
    let folder = Folder::new();
    let image = folder.image("a", None);
    let writing = |option: &str| {
        let typed = format!("driver=qcow2,file.filename={image},{option}=on");
        refused(&typed, true, &all().writable()).into_kind()
    };
    assert!(matches!(writing("read-only"), FailureKind::ReadOnlyNode));
    assert!(matches!(writing("force-share"), FailureKind::SharedAndWritable));
}

#[test]
fn the_layer_at_fault_and_the_backing_file_that_is_missing() {
    let folder = Folder::new();
    folder.image("middle", Some(("base", "raw")));
    let top = folder.image("top", Some(("middle", "qcow2")));
    let failure = refused(&top, false, &all());
    assert_eq!(failure.layer(), 2);
    let missing = failure.missing_backing().unwrap();
    assert_eq!((&*missing.recorded, Path::new(&missing.above)), ("base", &*folder.path("middle")));
    assert!(failure.to_string().starts_with("could not open the backing file 2 layers below"), "{failure}");
}

#[test]
fn names_in_images_lead_as_far_as_the_caller_says() {
    let folder = Folder::new();
    let other = Folder::new();
    folder.image("base", None);
    let outside = other.image("base", None);
    let json = format!("json:{{\"driver\": \"qcow2\", \"file\": {{\"filename\": \"{outside}\"}}}}");
    let near = folder.image("near", Some(("base", "qcow2")));
    let far = folder.image("far", Some((&outside, "qcow2")));
    let described = folder.image("described", Some((&json, "qcow2")));
    use Follow::{All, Nothing, SameDirectory};
    for (image, follow, opens) in [
        (&near, Nothing, false),
        (&near, SameDirectory, true),
        (&near, All, true),
        (&far, Nothing, false),
        (&far, SameDirectory, false),
        (&far, All, true),
        (&described, Nothing, false),
        (&described, SameDirectory, false),
        (&described, All, true),
    ] {
        let how = OpenOptions::new().with_follow(follow);
        if opens {
            let opened = open(&ImageName::parse(image, &Naming::default()).unwrap(), &how).unwrap();
            assert_eq!(opened.files.len(), 2, "{image} {follow:?}");
            continue;
        }
        let failure = refused(image, false, &how);
        assert!(failure.cause::<ResolveError>().is_some_and(ResolveError::is_denied), "{image} {follow:?}");
    }
    // Whoever looks at the image alone opens nothing, and a name of the user's own always leads somewhere.
    let own =
        format!("driver=qcow2,file.filename={far},backing.driver=qcow2,backing.file.filename={outside}");
    for (typed, is_list, how) in
        [(&far, false, OpenOptions::new().top_only()), (&own, true, OpenOptions::new())]
    {
        open(&ImageName::parse(typed, &Naming::default().as_list(is_list)).unwrap(), &how).unwrap();
    }
}

#[test]
fn loops_and_depth() {
    let folder = Folder::new();
    let path = folder.path("a").to_str().unwrap().to_owned();
    // The image stands inside itself, where the engine does not see it.
    let inside = r#"json:{"driver": "raw", "file": {"driver": "qcow2", "file": {"filename": "@"}}}"#;
    let inside = inside.replace('@', &path);
    folder.image("a", Some((&inside, "raw")));
    let failure = refused(&path, false, &all());
    assert!(matches!(failure.kind(), FailureKind::Engine(_)));
    assert!(matches!(failure.origin(), FailureKind::Loop(name) if *name == path), "{:?}", failure.origin());
    let deep = format!(
        "driver=raw,{}filename={path}",
        (1..=40)
            .map(|n| {
                let file = "file.".repeat(n);
                if n < 40 { format!("{file}driver=raw,") } else { file }
            })
            .collect::<String>()
    );
    assert!(matches!(refused_list(&deep), FailureKind::TooDeep(32)));
}

#[test]
fn snapshots_and_bases_that_are_not_there() {
    let folder = Folder::new();
    let path = folder.image("a", None);
    let name = ImageName::parse(&path, &Naming::default()).unwrap();
    let failure = open_snapshot(&name, &all(), |_| None).map(|_| ()).unwrap_err();
    assert!(matches!(failure.kind(), FailureKind::NoSuchSnapshot));
    std::fs::write(folder.path("raw"), [0; 512]).unwrap();
    let raw = ImageName::parse(folder.path("raw").to_str().unwrap(), &Naming::default()).unwrap();
    let failure = open_snapshot(&raw, &all(), |_| None).map(|_| ()).unwrap_err();
    assert!(matches!(failure.kind(), FailureKind::NoSnapshots));
    let chain = ChainFiles::new(&name, &all(), &|_, _| {});
    let options = CommitOptions::default().with_base(Some("b".to_owned()));
    let error = commit(&chain, &options, &Inline, &Silent).unwrap_err();
    assert_eq!(error.caller_error::<ChainError>().unwrap(), ChainError::NoBase(Some("b".to_owned())));
    let missing = folder.path("none").to_str().unwrap().to_owned();
    let missing = ImageName::parse(&missing, &Naming::default()).unwrap();
    let chain = ChainFiles::new(&missing, &all(), &|_, _| {});
    let error = commit(&chain, &CommitOptions::default(), &Inline, &Silent).unwrap_err();
    let failure = error.caller_error::<OpenFailure>().unwrap();
    assert!(matches!(failure.kind(), FailureKind::File { .. }));
}

#[test]
fn a_raw_disk_by_its_looks_is_warned_of() {
    let folder = Folder::new();
    std::fs::write(folder.path("raw"), [0; 512]).unwrap();
    let path = folder.path("raw").to_str().unwrap().to_owned();
    let guessed = ImageName::parse(&path, &Naming::default()).unwrap();
    let format = open_bytes(&guessed, &all()).unwrap().source.format;
    assert_eq!(format, ImageFormat::Raw);
    assert!(matches!(guessed.guess_warning(&format), Some(Warning::GuessedRaw(name)) if name == path));
    let given = ImageName::parse(&path, &Naming::default().with_format(Some("raw".to_owned()))).unwrap();
    assert!(given.guess_warning(&format).is_none());
}

#[test]
fn keys_by_layer() {
    let secrets = Secrets::default();
    let list = "driver=qcow2,file.filename=a,encrypt.key-secret=top,backing.encrypt.key-secret=base";
    let name = ImageName::parse(list, &Naming::new(&secrets).as_list(true)).unwrap();
    let missing = |keys: &Keys, depth| match keys.password(depth, "a", false).unwrap_err() {
        KeyError::NoSecret(NoSecret::Missing(id)) => Some(id),
        _ => None,
    };
    assert_eq!(missing(&name.keys, 0).as_deref(), Some("top"));
    assert_eq!(missing(&name.keys, 1).as_deref(), Some("base"));
    assert_eq!(missing(&name.keys.below(), 0).as_deref(), Some("base"));
    assert_eq!(missing(&name.keys.above(), 1).as_deref(), Some("top"));
    assert!(matches!(name.keys.password(2, "a", true), Err(KeyError::NotNamed { container: true })));
}
