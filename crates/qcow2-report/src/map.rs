//! What `map` shows, as JSON and for people, row by row.

use super::human;
use qcow2_blockdev::LayerFiles;
use qcow2_ops::MapExtent;
use std::fmt::Write;

/// Rows for people: stored runs only.
#[derive(Debug)]
pub struct TextRows<'a> {
    files: &'a [LayerFiles],
}

impl<'a> TextRows<'a> {
    /// What stands above the rows.
    pub const HEADER: &'static str = "Offset          Length          Mapped to       File\n";

    /// `files`: those of each layer, top first.
    pub fn new(files: &'a [LayerFiles]) -> Self {
        Self { files }
    }

    /// The row of `extent`, empty for a run that is not stored; `None` for one that has no plain place in a
    /// file, because it is compressed or encrypted or somewhere else.
    pub fn row(&self, extent: &MapExtent) -> Option<String> {
        if !extent.data || extent.zero {
            return Some(String::new());
        }
        let host = extent.host?;
        let file = self.files.get(extent.depth as usize).map_or("", LayerFiles::data_file);
        let (start, len, host) = (hex(extent.start), hex(extent.len), hex(host.value()));
        Some(format!("{start:<16}{len:<16}{host:<16}{}\n", human::escaped(file)))
    }
}

/// Rows of a JSON array, one object a line.
#[derive(Debug, Default)]
pub struct JsonRows {
    begun: bool,
}

impl JsonRows {
    /// What ends the array.
    pub const END: &'static str = "]\n";

    /// The row of `extent`, with what must stand before it.
    pub fn row(&mut self, extent: &MapExtent) -> String {
        let mut row = String::from(if self.begun { ",\n" } else { "[" });
        self.begun = true;
        let MapExtent { start, len, depth, present, zero, data, compressed, host } = extent;
        let _ = write!(
            row,
            "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
        );
        if let Some(host) = host {
            let _ = write!(row, ", \"offset\": {}", host.value());
        }
        row.push('}');
        row
    }
}

/// As C's `%#x` has it: no prefix before zero.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::HostOffset;

    fn stored(start: u64, len: u64, host: u64) -> MapExtent {
        MapExtent {
            start,
            len,
            present: true,
            data: true,
            host: Some(HostOffset::new(host)),
            ..MapExtent::default()
        }
    }

    #[test]
    fn text_rows() {
        let files = [LayerFiles { image: "a\n.qcow2".into(), ..LayerFiles::default() }];
        let rows = TextRows::new(&files);
        let row = rows.row(&stored(0, 0x10000, 0x50000)).unwrap();
        assert_eq!(row, "0               0x10000         0x50000         a\\n.qcow2\n");
        assert_eq!(rows.row(&MapExtent { zero: true, ..stored(0, 512, 0) }).unwrap(), "");
        assert!(rows.row(&MapExtent { host: None, compressed: true, ..stored(0, 512, 0) }).is_none());
    }

    #[test]
    fn json_rows() {
        let mut rows = JsonRows::default();
        assert_eq!(
            rows.row(&stored(0, 512, 327_680)),
            "[{ \"start\": 0, \"length\": 512, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \
             \"compressed\": false, \"offset\": 327680}"
        );
        let second = rows.row(&MapExtent { start: 512, len: 512, zero: true, ..MapExtent::default() });
        assert!(second.starts_with(",\n{ \"start\": 512,") && second.ends_with("\"compressed\": false}"));
    }
}
