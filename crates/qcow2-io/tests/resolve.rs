//! Names inside images: how they resolve, and which ones are refused.
#![allow(clippy::unwrap_used)]

use qcow2_core::{HostOffset, ImageFormat, Reference, ResolveError, ResolvedSource, Resolver};
use qcow2_io::{
    FileResolver, Locking, OpenError, OpenErrorKind, OpenFile, Policy, SourceOptions, open_source,
};
use std::error::Error as _;
use std::fs;
use std::path::Path;

fn backing<'a>(name: &'a str, format: Option<&'a str>) -> Reference<'a> {
    Reference::Backing { name, format }
}

/// A directory with an image in `images/`, a base beside it, and a file in a neighbouring directory.
fn world() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("images")).unwrap();
    fs::create_dir(dir.path().join("images/sub")).unwrap();
    fs::write(dir.path().join("images/base"), b"QFI\xFB\x00\x00\x00\x03").unwrap();
    fs::write(dir.path().join("images/sub/base"), b"deeper").unwrap();
    fs::write(dir.path().join("images/json:{}"), b"odd name").unwrap();
    fs::write(dir.path().join("secret"), b"secret").unwrap();
    dir
}

fn resolver(world: &tempfile::TempDir, policy: Policy) -> FileResolver {
    FileResolver::new(world.path().join("images/top"), policy)
}

fn content(source: &ResolvedSource) -> Vec<u8> {
    let mut bytes = vec![0; source.storage.len().unwrap() as usize];
    source.storage.read_at(HostOffset::new(0), &mut bytes).unwrap();
    bytes
}

fn refusal(result: Result<ResolvedSource, ResolveError>) -> ResolveError {
    result.map(|source| source.name).unwrap_err()
}

#[test]
fn relative_names_start_at_the_image_directory() {
    let world = world();
    let resolver = resolver(&world, Policy::Allow);
    for name in ["sub/base", "./sub/base", "file:sub/base"] {
        assert_eq!(content(&resolver.resolve(backing(name, None), false).unwrap()), b"deeper", "{name}");
    }
    let absolute = world.path().join("secret");
    let source = resolver.resolve(backing(absolute.to_str().unwrap(), None), false).unwrap();
    assert_eq!(content(&source), b"secret");
    // The next name in the chain is relative to the image that contains it.
    let deeper = resolver.resolve(backing("sub/base", None), false).unwrap();
    let next = deeper.resolver.resolve(backing("base", None), false).unwrap();
    assert_eq!(content(&next), b"deeper");
    assert_eq!(next.id, deeper.id);
    assert!(next.id.is_some());
}

#[test]
fn the_recorded_format_wins_over_probing() {
    let world = world();
    let resolver = resolver(&world, Policy::Allow);
    let format = |recorded| resolver.resolve(backing("base", recorded), false).unwrap().format;
    assert_eq!(format(None), ImageFormat::Qcow2);
    assert_eq!(format(Some("raw")), ImageFormat::Raw);
    assert_eq!(format(Some("qcow2")), ImageFormat::Qcow2);
    assert_eq!(format(Some("vhdx")), ImageFormat::Other("vhdx".into()));
    let data = resolver.resolve(Reference::DataFile { name: "base" }, false).unwrap();
    assert_eq!(data.format, ImageFormat::Raw);
}

#[test]
fn nothing_is_opened_by_default() {
    let world = world();
    for resolver in [resolver(&world, Policy::Deny), resolver(&world, Policy::default())] {
        assert!(refusal(resolver.resolve(backing("base", Some("raw")), false)).is_denied());
        assert!(refusal(resolver.resolve(Reference::DataFile { name: "base" }, true)).is_denied());
    }
    let top = open_source(&world.path().join("images/base"), &SourceOptions::default()).unwrap();
    assert!(refusal(top.resolver.resolve(backing("base", None), false)).is_denied());
}

#[cfg(unix)]
#[test]
fn same_directory_excludes_subdirectories_parents_and_links() {
    let world = world();
    let resolver = resolver(&world, Policy::SameDirectory);
    let secret = world.path().join("secret");
    std::os::unix::fs::symlink(&secret, world.path().join("images/link")).unwrap();
    let full = world.path().join("images/base");
    for name in ["base", "./base", "file:base", "sub/../base", full.to_str().unwrap()] {
        resolver.resolve(backing(name, None), false).unwrap();
    }
    for name in ["sub/base", "../secret", secret.to_str().unwrap(), "..", ".", "sub/..", "/"] {
        let error = refusal(resolver.resolve(backing(name, None), false));
        assert!(error.is_denied(), "{name}: {error}");
        assert!(refusal(resolver.resolve(Reference::DataFile { name }, false)).is_denied(), "{name}");
    }
    let error = refusal(resolver.resolve(backing("link", None), false));
    assert_eq!(open_error(&error).kind(), OpenErrorKind::NotRegular);
}

/// The open error that a refusal wraps.
fn open_error(error: &ResolveError) -> &OpenError {
    error.source().unwrap().downcast_ref().unwrap()
}

#[test]
fn protocols_and_json_names_are_refused() {
    let world = world();
    let resolver = resolver(&world, Policy::Allow);
    for name in ["json:{}", "nbd://host/x", "http://x/y", "fat:dir", "foo:base", "", "a\0b"] {
        refusal(resolver.resolve(backing(name, Some("raw")), false));
    }
    // A data file's name is always a plain path.
    let odd = resolver.resolve(Reference::DataFile { name: "json:{}" }, false).unwrap();
    assert_eq!(content(&odd), b"odd name");
    let missing = refusal(resolver.resolve(Reference::DataFile { name: "file:base" }, false));
    assert_eq!(open_error(&missing).kind(), OpenErrorKind::NotFound);
}

#[test]
fn a_missing_file_is_named_by_its_place() {
    let resolver = FileResolver::new("some/where/top", Policy::Allow);
    let error = refusal(resolver.resolve(backing("nofile", None), false));
    assert!(!error.is_denied());
    let error = open_error(&error);
    assert_eq!(error.to_string(), "could not open 'some/where/nofile'");
    assert_eq!(error.reason(), "No such file or directory");
}

#[cfg(target_os = "linux")]
#[test]
fn pipes_and_devices_are_not_opened() {
    let world = world();
    let pipe = world.path().join("images/pipe");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for policy in [Policy::Allow, Policy::SameDirectory] {
        let error = refusal(resolver(&world, policy).resolve(backing("pipe", Some("raw")), false));
        assert_eq!(open_error(&error).kind(), OpenErrorKind::NotRegular, "{policy:?}");
    }
    for name in ["/dev/zero", "/dev/tty", "/", "/proc/self/mem"] {
        let result = resolver(&world, Policy::SameDirectory).resolve(backing(name, Some("raw")), false);
        assert!(refusal(result).is_denied(), "{name}");
    }
    for name in ["/dev/zero", "/"] {
        refusal(resolver(&world, Policy::Allow).resolve(backing(name, Some("raw")), false));
    }
}

#[test]
fn data_files_open_for_writing_on_request() {
    let world = world();
    let resolver = resolver(&world, Policy::Allow);
    let data = resolver.resolve(Reference::DataFile { name: "base" }, true).unwrap();
    data.storage.write_at(HostOffset::new(0), b"x").unwrap();
    let base = resolver.resolve(backing("sub/base", None), false).unwrap();
    base.storage.write_at(HostOffset::new(0), b"x").unwrap_err();
    drop(data);
    let data = resolver.resolve(Reference::DataFile { name: "base" }, false).unwrap();
    data.storage.write_at(HostOffset::new(0), b"x").unwrap_err();
}

/// As commit needs it: a backing file of either format opens for writing, and the files it names stay
/// read-only.
#[test]
fn backing_files_open_for_writing_on_request() {
    let world = world();
    let resolver = resolver(&world, Policy::Allow);
    let base = resolver.resolve(backing("sub/base", Some("raw")), true).unwrap();
    base.storage.write_at(HostOffset::new(0), b"changed").unwrap();
    base.storage.flush().unwrap();
    assert_eq!(base.format, ImageFormat::Raw);
    // QEMU's lock rules: while somebody writes, nobody else may write, and a reader that excludes writers may
    // not open. Readers of a raw disk share it with its writers.
    refusal(resolver.resolve(backing("sub/base", Some("raw")), true));
    let top = world.path().join("images/top");
    fs::write(&top, b"top").unwrap();
    let alone = SourceOptions::new(OpenFile::read_only().with_locking(Locking::NoOtherWriters));
    let alone = open_source(&top, &alone.with_policy(Policy::Allow)).unwrap().resolver;
    refusal(alone.resolve(backing("sub/base", Some("raw")), false));
    drop(resolver.resolve(backing("sub/base", Some("raw")), false).unwrap());
    refusal(resolver.resolve(backing("sub/base", Some("qcow2")), false));
    drop(base);
    let base = resolver.resolve(backing("sub/base", Some("raw")), false).unwrap();
    let mut seen = [0; 7];
    base.storage.read_at(HostOffset::new(0), &mut seen).unwrap();
    assert_eq!(&seen, b"changed");
    drop(base);
    // [`Policy::Deny`] applies to writing too.
    let denied = FileResolver::new(world.path().join("images/top"), Policy::Deny)
        .resolve(backing("sub/base", Some("raw")), true);
    assert!(refusal(denied).is_denied());
}

#[test]
fn a_given_format_is_not_probed() {
    let world = world();
    let path = world.path().join("images/base");
    let options = SourceOptions::new(OpenFile::read_only()).with_format(ImageFormat::Raw);
    assert_eq!(open_source(&path, &options).unwrap().format, ImageFormat::Raw);
    let error = open_source(Path::new("nofile"), &options).map(|s| s.name).unwrap_err();
    assert_eq!(error.to_string(), "could not open 'nofile'");
}
