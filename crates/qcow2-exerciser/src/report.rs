//! Formats reports of finished requests: sizes, times, rates, dumps. Pure text.

use std::fmt::Write;
use std::time::Duration;

/// A finished request, as its report shows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished {
    /// `read`, `wrote` or `discard`.
    pub(crate) verb: &'static str,
    /// First byte.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) len: u64,
    /// Duration.
    pub(crate) elapsed: Duration,
}

impl Finished {
    /// The two lines of the normal report.
    pub(crate) fn text(&self) -> String {
        let Self { verb, offset, len, .. } = self;
        format!(
            "{verb} {len}/{len} bytes at offset {offset}\n{}, 1 ops; {} ({}/sec and {:.4} ops/sec)\n",
            size(*len),
            time(self.elapsed),
            scaled(self.per_second(*len)),
            self.per_second(1),
        )
    }

    /// The line of comma-separated values (`-C`).
    pub(crate) fn csv(&self) -> String {
        let elapsed = long_time(self.elapsed);
        let (bytes, ops) = (self.per_second(self.len), self.per_second(1));
        format!("{},1,{elapsed},{bytes:.3},{ops:.3}\n", self.len)
    }

    fn per_second(&self, amount: u64) -> f64 {
        // At least 1 ns: a clock that has not advanced would make the rate infinite.
        amount as f64 / self.elapsed.max(Duration::from_nanos(1)).as_secs_f64()
    }
}

/// `bytes` in the largest unit that it fills: `1.500 KiB`, `64 KiB`, `20 bytes`.
pub(crate) fn size(bytes: u64) -> String {
    scaled(bytes as f64)
}

fn scaled(bytes: f64) -> String {
    let unit = (1..UNITS.len()).rev().find(|&unit| bytes >= scale(unit)).unwrap_or(0);
    let places = if unit == 0 { 6 } else { 3 };
    let number = format!("{:.places$}", bytes / scale(unit));
    let whole = number.split_once('.').filter(|(_, rest)| rest.bytes().all(|b| b == b'0'));
    format!("{} {}", whole.map_or(&*number, |(whole, _)| whole), UNITS[unit])
}

fn scale(unit: usize) -> f64 {
    1024f64.powi(i32::try_from(unit).unwrap_or(0))
}

const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

fn time(elapsed: Duration) -> String {
    match elapsed.as_secs() {
        0 => format!("00.{:02} sec", elapsed.subsec_millis() / 10),
        _ => long_time(elapsed),
    }
}

fn long_time(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours}:{minutes:02}:{:02}.{:02}", seconds % 60, elapsed.subsec_millis() / 10)
}

/// Hex dump of `bytes`, which start at guest offset `offset`: sixteen bytes per line, as numbers and as
/// characters.
pub(crate) fn dump(offset: u64, bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 5);
    for (index, line) in bytes.chunks(16).enumerate() {
        let _ = write!(text, "{:08x}:  ", offset + index as u64 * 16);
        for byte in line {
            let _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        text.extend(
            line.iter().map(|byte| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' }),
        );
        text.push('\n');
    }
    text
}

/// One line of `map`.
pub(crate) fn map_line(offset: u64, len: u64, allocated: bool) -> String {
    let what = if allocated { "    allocated" } else { "not allocated" };
    format!("{} ({len:#x}) bytes {what} at offset {} ({offset:#x})\n", size(len), size(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes as qemu-io 10.0.2 shows them.
    #[test]
    fn sizes_use_the_largest_unit() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (20, "20 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (3584, "3.500 KiB"),
            (196_608, "192 KiB"),
            (2_031_616, "1.938 MiB"),
            (10_485_760, "10 MiB"),
            (2_000_000_000, "1.863 GiB"),
            (1 << 40, "1 TiB"),
            (i64::MAX as u64, "8 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
        assert_eq!(scaled(18.618_097), "18.618097 bytes");
    }

    fn finished(len: u64, elapsed: Duration) -> Finished {
        Finished { verb: "wrote", offset: 512, len, elapsed }
    }

    #[test]
    fn reports_have_sizes_times_and_rates() {
        let quick = finished(65536, Duration::from_millis(39));
        assert_eq!(
            quick.text(),
            "wrote 65536/65536 bytes at offset 512\n\
             64 KiB, 1 ops; 00.03 sec (1.603 MiB/sec and 25.6410 ops/sec)\n"
        );
        assert_eq!(quick.csv(), "65536,1,0:00:00.03,1680410.256,25.641\n");
        let slow = finished(2_000_000_000, Duration::from_millis(6_165));
        assert!(slow.text().contains("1.863 GiB, 1 ops; 0:00:06.16 (309.383 MiB/sec and 0.1622 ops/sec)"));
        let nothing = finished(0, Duration::ZERO);
        assert!(nothing.text().contains("0 bytes, 1 ops; 00.00 sec (0 bytes/sec and "));
    }

    #[test]
    fn dump_lines_start_with_the_offset() {
        let mut bytes = b"abc 09AZaz\x00\x7f~[{:".to_vec();
        bytes.extend([0xfe, 0x31]);
        assert_eq!(
            dump(0x10_0000_0003, &bytes),
            "1000000003:  61 62 63 20 30 39 41 5a 61 7a 00 7f 7e 5b 7b 3a  abc.09AZaz......\n\
             1000000013:  fe 31  .1\n"
        );
        assert_eq!(dump(0, &[]), "");
    }

    #[test]
    fn map_lines_show_size_and_offset() {
        assert_eq!(
            map_line(0, 0x30000, true),
            "192 KiB (0x30000) bytes     allocated at offset 0 bytes (0x0)\n"
        );
        assert_eq!(
            map_line(0x40000, 0x9c0000, false),
            "9.750 MiB (0x9c0000) bytes not allocated at offset 256 KiB (0x40000)\n"
        );
    }
}
