//! What `info` shows, as JSON and for people.

use super::human;
use qcow2_blockdev::NodeFacts;
use qcow2_core::format::bitmap::Bitmap;
use qcow2_core::format::crypt::{LuksHeader, LuksSlot};
use qcow2_core::format::snapshot::Snapshot;
use qcow2_core::format::text::bytes_of;
use qcow2_core::format::{CompressionType, Version};
use qcow2_ops::info::{Encryption, InfoReport, Qcow2Info};
use qcow2_ops::vet::NamedFile;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

/// A report with the names that go with it.
#[derive(Debug)]
pub struct NamedInfo {
    /// The image's name as it was opened.
    pub filename: String,
    /// Where the backing file's name leads, if there is one.
    pub full_backing: Option<String>,
    /// The name of its format.
    pub format: &'static str,
    /// What the format stands on, from the top.
    pub nodes: Vec<NodeFacts>,
    /// What was learned.
    pub report: InfoReport,
    /// What it names, where the JSON says so.
    pub references: Option<Vec<NamedFile>>,
}

/// The report as qemu-img's JSON object, keys in its order.
pub fn to_json(info: &NamedInfo) -> Value {
    let report = &info.report;
    let qcow2 = report.qcow2.as_ref();
    let backing = qcow2.and_then(|q| q.backing.as_ref());
    let snapshots = qcow2.map(|q| &q.snapshots).filter(|snapshots| !snapshots.is_empty());
    let flag = qcow2.is_some() || info.format == "file" || is_on_file(&info.nodes);
    let encrypted = report.luks.is_some() || qcow2.is_some_and(|q| q.encryption.is_some());
    let specific = match &report.luks {
        Some(luks) => Some(json!({"type": "luks", "data": luks_json(luks, None)})),
        None => qcow2.map(|q| json!({"type": "qcow2", "data": specific_json(q)})),
    };
    Fields::default()
        .put("children", children_json(&info.nodes))
        .put_some("snapshots", snapshots.map(|s| s.iter().map(snapshot_json).collect::<Value>()))
        .put_some("backing-filename-format", backing.and_then(|b| b.format.as_deref()))
        .put("virtual-size", sectors(report.virtual_size))
        .put("filename", &*info.filename)
        .put_some("cluster-size", qcow2.map(|q| q.cluster_size))
        .put("format", info.format)
        .put_some("actual-size", report.used_bytes)
        .put_some("format-specific", specific)
        .put_some("full-backing-filename", info.full_backing.as_deref().filter(|_| backing.is_some()))
        .put_some("encrypted", encrypted.then_some(true))
        .put_some("backing-filename", backing.map(|b| &*b.name))
        .put_some("dirty-flag", flag.then(|| qcow2.is_some_and(|q| q.dirty)))
        .put_some(
            "references",
            info.references.as_ref().map(|all| all.iter().map(named_json).collect::<Value>()),
        )
        .into_value()
}

fn named_json(named: &NamedFile) -> Value {
    json!({"role": named.role, "kind": named.kind.name(), "name": named.name, "format": named.format})
}

/// The report for people.
pub fn to_text(info: &NamedInfo) -> String {
    let report = &info.report;
    let disk_size = report.used_bytes.map_or_else(|| "unavailable".to_owned(), human::size);
    let filename = human::escaped(&info.filename);
    let mut out = String::new();
    let _ = writeln!(out, "image: {filename}");
    let _ = writeln!(out, "file format: {}", info.format);
    let _ = writeln!(out, "virtual size: {}", size_and_bytes(report.virtual_size));
    let _ = writeln!(out, "disk size: {disk_size}");
    if let Some(qcow2) = &report.qcow2 {
        push_qcow2(&mut out, qcow2, info.full_backing.as_deref());
    }
    if let Some(luks) = &report.luks {
        let tree = human::tree(&luks_json(luks, None), 1);
        let _ = write!(out, "encrypted: yes\nFormat specific information:\n{tree}");
    }
    push_nodes(&mut out, "", 0, &info.nodes);
    out
}

/// The heading and one line a snapshot.
pub fn snapshot_table(snapshots: &[Snapshot]) -> String {
    let mut out =
        String::from("ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n");
    for snapshot in snapshots {
        let icount = snapshot.icount.map_or_else(|| "--".to_owned(), |n| n.to_string());
        let _ = writeln!(
            out,
            "{} {} {:>8} {:>19} {:>15} {:>10}",
            padded(&human::escaped(&snapshot.id_text()), 7),
            padded(&human::escaped(&snapshot.name_text()), 16),
            human::size(snapshot.vm_state_size),
            local_time(snapshot.date_seconds),
            vm_clock(snapshot.vm_clock_nanoseconds),
            icount
        );
    }
    out
}

fn push_qcow2(out: &mut String, qcow2: &Qcow2Info, full_backing: Option<&str>) {
    if qcow2.encryption.is_some() {
        out.push_str("encrypted: yes\n");
    }
    let _ = writeln!(out, "cluster_size: {}", qcow2.cluster_size);
    if qcow2.dirty {
        out.push_str("cleanly shut down: no\n");
    }
    if let Some(backing) = &qcow2.backing {
        let _ = write!(out, "backing file: {}", human::escaped(&backing.name));
        if let Some(full) = full_backing.filter(|full| *full != backing.name) {
            let _ = write!(out, " (actual path: {})", human::escaped(full));
        }
        out.push('\n');
        if let Some(format) = &backing.format {
            let _ = writeln!(out, "backing file format: {}", human::escaped(format));
        }
    }
    if !qcow2.snapshots.is_empty() {
        let _ = write!(out, "Snapshot list:\n{}", snapshot_table(&qcow2.snapshots));
    }
    out.push_str(&specific_text(qcow2));
}

/// What only this format has, for people.
pub fn specific_text(qcow2: &Qcow2Info) -> String {
    format!("Format specific information:\n{}", human::tree(&specific_json(qcow2), 1))
}

/// Each node below a heading of its own, the later ones further in.
fn push_nodes(out: &mut String, above: &str, depth: usize, nodes: &[NodeFacts]) {
    let mut path = above.to_owned();
    for (depth, node) in (depth..).zip(nodes) {
        let indent = " ".repeat(4 * depth);
        push_nodes(out, &path, depth, &node.sibling);
        let _ = write!(path, "/{}", node.role);
        let _ = writeln!(out, "{indent}Child node '{path}':");
        let disk_size = node.used.map_or_else(|| "unavailable".to_owned(), human::size);
        let labels = match node.is_file || std::ptr::eq(node, &raw const nodes[nodes.len() - 1]) {
            true => ["filename", "protocol type", "file length"],
            false => ["image", "file format", "virtual size"],
        };
        let values = [human::escaped(&node.filename), node.driver.to_owned(), size_and_bytes(node.len)];
        for (label, value) in labels.iter().zip(values) {
            let _ = writeln!(out, "{indent}    {label}: {value}");
        }
        let _ = writeln!(out, "{indent}    disk size: {disk_size}");
    }
}

fn children_json(nodes: &[NodeFacts]) -> Value {
    let Some((node, below)) = nodes.split_first() else { return json!([]) };
    let info = Fields::default()
        .put("children", children_json(below))
        .put("virtual-size", sectors(node.len))
        .put("filename", &*node.filename)
        .put("format", node.driver)
        .put_some("actual-size", node.used)
        .put_some("format-specific", node.is_file.then(|| json!({"type": "file", "data": {}})))
        .put_some("dirty-flag", is_on_file(nodes).then_some(false))
        .into_value();
    let mut children = match children_json(&node.sibling) {
        Value::Array(siblings) => siblings,
        _ => Vec::new(),
    };
    children.push(json!({"name": node.role, "info": info}));
    Value::Array(children)
}

fn is_on_file(nodes: &[NodeFacts]) -> bool {
    nodes.last().is_some_and(|node| node.is_file)
}

fn specific_json(qcow2: &Qcow2Info) -> Value {
    let v3 = qcow2.version >= Version::V3;
    let compression = match qcow2.compression_type {
        CompressionType::Deflate => "zlib",
        CompressionType::Zstd => "zstd",
    };
    let damage: BTreeMap<Option<usize>, &str> =
        qcow2.bitmap_damage.iter().map(|damage| (damage.index, &*damage.text)).collect();
    let bitmap = |(index, bitmap)| bitmap_json(bitmap, damage.get(&Some(index)).copied());
    let bitmaps =
        (!qcow2.bitmaps.is_empty()).then(|| qcow2.bitmaps.iter().enumerate().map(bitmap).collect::<Value>());
    let encrypt = qcow2.encryption.as_ref().map(|encryption| match encryption {
        Encryption::Aes => json!({"format": "aes"}),
        Encryption::Luks(luks) => luks_json(luks, Some("luks")),
    });
    let data_file = qcow2.data_file.as_ref();
    Fields::default()
        .put("compat", if v3 { "1.1" } else { "0.10" })
        .put("compression-type", compression)
        .put_some("lazy-refcounts", v3.then_some(qcow2.lazy_refcounts))
        .put_some("bitmaps", bitmaps)
        .put_some("bitmap-directory-damage", damage.get(&None).copied())
        .put("refcount-bits", qcow2.refcount_bits)
        .put_some("encrypt", encrypt)
        .put_some("data-file", data_file.and_then(|d| d.name.as_deref()))
        .put_some("data-file-raw", data_file.map(|d| d.raw))
        .put_some("corrupt", v3.then_some(qcow2.corrupt))
        .put_some("extended-l2", v3.then_some(qcow2.extended_l2))
        .into_value()
}

/// `damage`: what is wrong with it, of which QEMU has no word, since it does not open such an image.
fn bitmap_json(bitmap: &Bitmap, damage: Option<&str>) -> Value {
    let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    let flags: Vec<&str> = flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
    Fields::default()
        .put("flags", flags)
        .put("name", bitmap.name_text())
        .put("granularity", 1u64.checked_shl(bitmap.granularity_bits.into()).unwrap_or(0))
        .put_some("damage", damage)
        .into_value()
}

/// `format`: told where an image could have another kind of encryption.
fn luks_json(luks: &LuksHeader, format: Option<&str>) -> Value {
    let (mode, ivgen) = luks.mode.split_once('-').unwrap_or((&luks.mode, ""));
    let (ivgen, ivgen_hash) = ivgen.split_once(':').map_or((ivgen, None), |(alg, hash)| (alg, Some(hash)));
    // XTS takes two keys.
    let key_bits = u64::from(luks.key_bytes) * 8 / if mode == "xts" { 2 } else { 1 };
    Fields::default()
        .put("ivgen-alg", ivgen)
        .put("detached-header", false)
        .put("hash-alg", &*luks.hash)
        .put("cipher-alg", format!("{}-{key_bits}", luks.cipher))
        .put("uuid", &*luks.uuid)
        .put_some("ivgen-hash-alg", ivgen_hash.filter(|_| ivgen == "essiv"))
        .put_some("format", format)
        .put("cipher-mode", mode)
        .put("slots", luks.slots.iter().map(slot_json).collect::<Value>())
        .put("payload-offset", u64::from(luks.payload_offset_sectors) * 512)
        .put("master-key-iters", luks.digest_iterations)
        .into_value()
}

fn slot_json(slot: &LuksSlot) -> Value {
    Fields::default()
        .put("active", slot.enabled)
        .put_some("iters", slot.enabled.then_some(slot.iterations))
        .put("key-offset", u64::from(slot.material_offset_sectors) * 512)
        .put_some("stripes", slot.enabled.then_some(slot.stripes))
        .into_value()
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    Fields::default()
        .put_some("icount", snapshot.icount)
        .put("vm-clock-nsec", snapshot.vm_clock_nanoseconds % NANOSECONDS)
        .put("name", snapshot.name_text())
        .put("date-sec", snapshot.date_seconds)
        .put("date-nsec", snapshot.date_nanoseconds)
        .put("vm-clock-sec", snapshot.vm_clock_nanoseconds / NANOSECONDS)
        .put("id", snapshot.id_text())
        .put("vm-state-size", snapshot.vm_state_size)
        .into_value()
}

/// An object in the making; keys stay in the order they came.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl Fields {
    fn put(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.insert(key.to_owned(), value.into());
        self
    }

    fn put_some(self, key: &str, value: Option<impl Into<Value>>) -> Self {
        match value {
            Some(value) => self.put(key, value),
            None => self,
        }
    }

    fn into_value(self) -> Value {
        Value::Object(self.0)
    }
}

/// Sizes are shown in whole sectors, as qemu-img's block layer has them.
fn sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(512).unwrap_or(bytes)
}

fn size_and_bytes(bytes: u64) -> String {
    let bytes = sectors(bytes);
    format!("{} ({bytes} bytes)", human::size(bytes))
}

/// `text` and spaces up to `width` bytes, which is how C counts.
fn padded(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(bytes_of(text).len())))
}

fn vm_clock(nanoseconds: u64) -> String {
    let (seconds, millis) = (nanoseconds / NANOSECONDS, nanoseconds % NANOSECONDS / 1_000_000);
    format!("{:04}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn local_time(seconds: u32) -> String {
    match jiff::Timestamp::from_second(seconds.into()) {
        Ok(time) => time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => seconds.to_string(),
    }
}

const NANOSECONDS: u64 = 1_000_000_000;
