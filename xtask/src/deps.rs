//! Allowed dependencies between crates: the arrows of ARCHITECTURE.md as a table, compared with cargo's
//! metadata.
//!
//! Only normal and build dependencies count as arrows. Tests and examples may use more (dev-dependencies),
//! but a crate that depends on the engine only if it is in [`DEV_EDGES`].

use crate::finding::Finding;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// One of our crates, and those of our crates that its shipped code may use.
const EDGES: &[(&str, &[&str])] = &[
    ("qcow2-format", &[]),
    ("qcow2-core", &["qcow2-format"]),
    ("qcow2-ops", &["qcow2-core", "qcow2-format"]),
    ("qcow2-nbd", &["qcow2-format"]),
    ("qcow2-io", &["qcow2-core", "qcow2-nbd"]),
    ("qcow2-codec", &["qcow2-core"]),
    ("qcow2-crypt", &["qcow2-core", "qcow2-format"]),
    ("qcow2-testkit", &["qcow2-core", "qcow2-format"]),
    ("qcow2-image", &["qcow2-core", "qcow2-format", "qcow2-ops", "qcow2-io", "qcow2-codec", "qcow2-crypt"]),
    (
        "qcow2-blockdev",
        &["qcow2-core", "qcow2-format", "qcow2-ops", "qcow2-io", "qcow2-codec", "qcow2-crypt"],
    ),
    ("qcow2-getopt", &[]),
    ("qcow2-report", &["qcow2-core", "qcow2-format", "qcow2-ops", "qcow2-blockdev"]),
    ("qcow2-exerciser", &["qcow2-core", "qcow2-format", "qcow2-ops", "qcow2-io", "qcow2-blockdev"]),
    // Serves any guest disk; its tests open images through the facade.
    ("qcow2-vhost-user", &["qcow2-core", "qcow2-io", "qcow2-image"]),
    // As the one above.
    ("qcow2-queue", &["qcow2-core", "qcow2-io", "qcow2-image"]),
    ("qcow2-terminal", &["qcow2-ops", "qcow2-crypt", "qcow2-blockdev", "qcow2-report"]),
    ("qcow2-serve", &["qcow2-core", "qcow2-getopt", "qcow2-nbd", "qcow2-ops", "qcow2-io", "qcow2-blockdev"]),
    (
        "qcow2-cli",
        &[
            "qcow2-core",
            "qcow2-format",
            "qcow2-ops",
            "qcow2-io",
            "qcow2-crypt",
            "qcow2-blockdev",
            "qcow2-exerciser",
            "qcow2-getopt",
            "qcow2-image",
            "qcow2-report",
            "qcow2-serve",
            "qcow2-terminal",
            "qcow2-vhost-user",
        ],
    ),
    ("xtask", &[]),
    ("qcow2-tests", ANY),
];

/// What tests, examples and benches of every crate may use in addition: adapters to run the engine on, and
/// the testkit.
const DEV_EDGES: &[&str] = &[
    "qcow2-format",
    "qcow2-core",
    "qcow2-ops",
    "qcow2-nbd",
    "qcow2-io",
    "qcow2-codec",
    "qcow2-crypt",
    "qcow2-testkit",
];

/// Third-party crates, and the only crates whose shipped code may use them. A crate that is not listed may be
/// used nowhere.
const OUTSIDE: &[(&str, &[&str])] = &[
    ("aes", &["qcow2-crypt"]),
    ("base64", &["qcow2-blockdev"]),
    ("blake3", &["qcow2-ops"]),
    ("bytes", ANY),
    ("cast5", &["qcow2-crypt"]),
    ("cipher", &["qcow2-crypt"]),
    ("crc32fast", ANY),
    ("flate2", &["qcow2-codec"]),
    ("getrandom", &["qcow2-io"]),
    ("indicatif", &["qcow2-terminal"]),
    ("jiff", &["qcow2-report"]),
    ("libc", &["qcow2-io"]),
    ("io-uring", &["qcow2-io"]),
    ("md-5", &["qcow2-crypt"]),
    ("pbkdf2", &["qcow2-crypt"]),
    ("proptest", &["qcow2-testkit", "qcow2-tests"]),
    ("ripemd", &["qcow2-crypt"]),
    (
        "rustix",
        &["qcow2-io", "qcow2-cli", "qcow2-serve", "qcow2-terminal", "qcow2-vhost-user", "qcow2-tests"],
    ),
    ("rustls", &["qcow2-nbd"]),
    ("serde_json", &["qcow2-blockdev", "qcow2-report", "qcow2-serve", "qcow2-cli", "qcow2-tests", "xtask"]),
    ("serpent", &["qcow2-crypt"]),
    ("sha1", &["qcow2-crypt"]),
    ("sha2", &["qcow2-crypt"]),
    ("shuttle", &["qcow2-core", "qcow2-ops"]),
    ("signal-hook", &["qcow2-cli", "qcow2-terminal"]),
    ("sm3", &["qcow2-crypt"]),
    ("subtle", &["qcow2-crypt"]),
    ("tempfile", &["qcow2-blockdev", "qcow2-testkit", "qcow2-tests"]),
    ("twofish", &["qcow2-crypt"]),
    ("vhost", &["qcow2-vhost-user"]),
    ("vhost-user-backend", &["qcow2-vhost-user"]),
    ("virtio-queue", &["qcow2-vhost-user"]),
    ("vm-memory", &["qcow2-io", "qcow2-vhost-user"]),
    ("vmm-sys-util", &["qcow2-vhost-user"]),
    ("zeroize", &["qcow2-crypt"]),
    ("zstd", &["qcow2-codec"]),
];

/// Third-party crates that only tests and benches may use, in any crate.
const DEV_ONLY: &[&str] =
    &["criterion", "proptest", "serde_json", "tempfile", "crc32fast", "bytes", "flate2", "zstd"];

/// Third-party crates that shipped code may use behind a feature only.
const OPTIONAL_ONLY: &[&str] = &["io-uring", "rustls", "shuttle"];

const ANY: &[&str] = &["*"];

/// One dependency as the manifest declares it.
#[derive(Clone, Debug)]
struct Arrow {
    from: String,
    to: String,
    dev: bool,
    optional: bool,
}

/// Compares the manifests under `root` with the tables.
pub(crate) fn check(root: &Path) -> Result<Vec<Finding>, String> {
    let output = Command::new(crate::cargo())
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .map_err(|e| format!("cannot run cargo metadata: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let metadata =
        serde_json::from_slice(&output.stdout).map_err(|e| format!("cargo metadata is no JSON: {e}"))?;
    let (ours, arrows) = read_metadata(&metadata).ok_or("cargo metadata has an unknown shape")?;
    Ok(judge(&ours, &arrows))
}

fn read_metadata(metadata: &Value) -> Option<(Vec<String>, Vec<Arrow>)> {
    let mut ours = Vec::new();
    let mut arrows = Vec::new();
    for package in metadata["packages"].as_array()? {
        let from = package["name"].as_str()?;
        ours.push(from.to_owned());
        for dependency in package["dependencies"].as_array()? {
            arrows.push(Arrow {
                from: from.to_owned(),
                to: dependency["name"].as_str()?.to_owned(),
                dev: dependency["kind"].as_str() == Some("dev"),
                optional: dependency["optional"].as_bool() == Some(true),
            });
        }
    }
    Some((ours, arrows))
}

fn judge(ours: &[String], arrows: &[Arrow]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in ours {
        if !EDGES.iter().any(|(from, _)| from == name) {
            findings.push(Finding::new(
                "edge",
                name.as_str(),
                0,
                "the crate has no row in the table of allowed dependencies",
                "a row in xtask/src/deps.rs and a paragraph in ARCHITECTURE.md",
            ));
        }
    }
    findings.extend(arrows.iter().filter_map(|arrow| {
        let allowed = if ours.contains(&arrow.to) { inside(arrow) } else { outside(arrow) };
        allowed.map(|allowed| {
            let kind = if arrow.dev { "dev-dependency" } else { "dependency" };
            Finding::new("edge", arrow.from.as_str(), 0, format!("{kind} on {}", arrow.to), allowed)
        })
    }));
    findings
}

/// The allowed alternatives if a dependency between two of our crates is not allowed; `None` if it is.
fn inside(arrow: &Arrow) -> Option<String> {
    let allowed = EDGES.iter().find(|(from, _)| *from == arrow.from).map_or(&[][..], |(_, to)| to);
    let listed = |list: &[&str]| list == ANY || list.contains(&arrow.to.as_str());
    if listed(allowed) || (arrow.dev && listed(DEV_EDGES)) {
        return None;
    }
    if arrow.to == "qcow2-testkit" {
        return Some("the testkit as a dev-dependency only".to_owned());
    }
    Some(format!("[{}]", allowed.join(", ")))
}

/// The same for a dependency on a third-party crate.
fn outside(arrow: &Arrow) -> Option<String> {
    let users = OUTSIDE.iter().find(|(name, _)| *name == arrow.to).map_or(&[][..], |(_, users)| users);
    if users == ANY || users.contains(&arrow.from.as_str()) {
        let must_be_optional = OPTIONAL_ONLY.contains(&arrow.to.as_str()) && !arrow.optional && !arrow.dev;
        return must_be_optional.then(|| format!("{} behind a feature", arrow.to));
    }
    if arrow.dev && DEV_ONLY.contains(&arrow.to.as_str()) {
        return None;
    }
    if users.is_empty() {
        return Some("only the crates listed in xtask/src/deps.rs".to_owned());
    }
    Some(format!("{} in [{}] only", arrow.to, users.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(from: &str, to: &str, dev: bool, fine: bool) {
        let ours: Vec<String> = EDGES.iter().map(|(name, _)| (*name).to_owned()).collect();
        let arrow = Arrow { from: from.to_owned(), to: to.to_owned(), dev, optional: false };
        let findings = judge(&ours, &[arrow]);
        assert_eq!(findings.is_empty(), fine, "{from} -> {to} (dev: {dev}): {findings:?}");
    }

    #[test]
    fn dependencies_point_inwards() {
        check("qcow2-core", "qcow2-format", false, true);
        check("qcow2-format", "qcow2-core", false, false);
        check("qcow2-core", "qcow2-io", false, false);
        check("qcow2-ops", "qcow2-io", false, false);
        check("qcow2-io", "qcow2-codec", false, false);
        check("qcow2-io", "qcow2-ops", false, false);
        check("qcow2-ops", "qcow2-cli", false, false);
        check("qcow2-cli", "qcow2-io", false, true);
        check("qcow2-image", "qcow2-io", false, true);
        check("qcow2-image", "qcow2-cli", false, false);
        check("qcow2-io", "qcow2-image", false, false);
    }

    #[test]
    fn the_testkit_is_for_tests_only() {
        check("qcow2-core", "qcow2-testkit", true, true);
        check("qcow2-core", "qcow2-io", true, true);
        check("qcow2-core", "qcow2-testkit", false, false);
        check("qcow2-cli", "qcow2-testkit", false, false);
        check("qcow2-core", "qcow2-cli", true, false);
        check("qcow2-tests", "qcow2-testkit", false, true);
        check("qcow2-tests", "qcow2-cli", false, true);
    }

    #[test]
    fn third_party_crates_are_used_only_where_listed() {
        check("qcow2-cli", "serde_json", false, true);
        check("qcow2-ops", "serde", false, false);
        check("qcow2-core", "flate2", false, false);
        check("qcow2-core", "proptest", true, true);
        check("qcow2-core", "proptest", false, false);
        check("qcow2-io", "libc", false, true);
        check("qcow2-core", "libc", false, false);
        check("qcow2-core", "shuttle", false, false);
        check("qcow2-cli", "never-heard-of", true, false);
    }

    #[test]
    fn a_new_crate_needs_a_row_in_the_table() {
        let findings = judge(&["qcow2-new".to_owned()], &[]);
        assert_eq!(findings.len(), 1, "{findings:?}");
    }

    #[test]
    fn dependency_kinds_are_read_from_the_metadata() {
        let metadata = serde_json::json!({"packages": [{"name": "a", "dependencies": [
            {"name": "b", "kind": null}, {"name": "c", "kind": "dev"}, {"name": "d", "kind": "build"}]}]});
        let (ours, arrows) = read_metadata(&metadata).unwrap();
        assert_eq!(ours, ["a"]);
        assert_eq!(arrows.iter().map(|a| a.dev).collect::<Vec<_>>(), [false, true, false]);
    }
}
