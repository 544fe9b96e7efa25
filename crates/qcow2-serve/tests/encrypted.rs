//! Nothing that a command makes holds the bytes of an encrypted disk in the clear.
#![cfg(unix)]
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may stop")]

use qcow2_blockdev::{
    CreateHow, ImageName, KeyValues, Naming, NewOptions, NewTarget, OpenOptions, Secrets, create, open,
};
use qcow2_core::{ImageFormat, LiveDisk};
use qcow2_serve::control::{Command, Controlled, ControlledOptions, Operator};
use qcow2_serve::export::{Export, ExportOptions};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

/// Serves the new image that `options` describe, opened as `list` says, and runs commands.
fn check(folder: &Path, format: &ImageFormat, options: &str, list: &str, is_refused: bool) {
    let mut secrets = Secrets::default();
    secrets.define("secret,id=s,data=abc").unwrap();
    let path = folder.join("disk").display().to_string();
    let options = NewOptions::parse(format, &KeyValues::parse_image_options(&[options.to_owned()])).unwrap();
    let how = CreateHow::new().with_secrets(&secrets);
    create(&NewTarget::parse(&path).unwrap(), &options, &how).unwrap();
    let naming = Naming::new(&secrets).as_list(true);
    let name = ImageName::parse(&format!("{list},file.filename={path}"), &naming).unwrap();
    let opening = OpenOptions::new().writable().with_exchangeable(true);
    let live = LiveDisk::new(open(&name, &opening).unwrap().disk);
    let export = Export::new(Arc::new(live), ExportOptions::default()).unwrap();
    let never = || false;
    let controlled = Controlled::new([(&export, ControlledOptions::new(&*path, opening))], &never);
    for (command, what) in [("snapshot", "its overlay"), ("backup", "its copy")] {
        let file = folder.join(command);
        let line = json!({"command": command, "file": file}).to_string();
        let answer = controlled.run(&Command::parse(&line).unwrap(), &|_| ());
        if is_refused {
            let text = format!("the disk is encrypted, and {what} would not be");
            assert_eq!(answer, Err(text), "{list}: {command}");
        } else {
            answer.unwrap();
        }
        assert_eq!(file.exists(), !is_refused, "{list}: {command}");
    }
}

#[test]
fn an_encrypted_disk_gets_no_plain_overlay_and_no_plain_copy() {
    let luks = "size=1M,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let container = "size=1M,key-secret=s,iter-time=10";
    for (format, options, list, is_refused) in [
        (ImageFormat::Qcow2, luks, "driver=qcow2,encrypt.key-secret=s", true),
        (ImageFormat::Luks, container, "driver=luks,key-secret=s", true),
        (ImageFormat::Qcow2, "size=1M", "driver=qcow2", false),
        (ImageFormat::Raw, "size=1M", "driver=raw", false),
    ] {
        let folder = tempfile::tempdir().unwrap();
        check(folder.path(), &format, options, list, is_refused);
    }
}
