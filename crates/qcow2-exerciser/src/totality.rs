//! Any text is a valid input: random mutations of commands must cause no panic, no hang, and no more memory
//! than one request needs.

use crate::grammar::{Command, Content, Place, find, parse, split};
use crate::{Console, Exerciser, Flow, OpenRequest, OpenedDisk, Opener, Ports, Refusal};
use qcow2_core::{CreateOptions, ImageFormat, OpenOptions, RawDisk, ResolvedSource, Storage};
use qcow2_io::MemoryStorage;
use qcow2_testkit::rng::Rng;
use std::cell::Cell;
use std::sync::Arc;

const SIZE: u64 = 1 << 20;
/// Limit in bytes for a request that a test runs; larger ones are parsed but not run.
const MOST: u64 = 64 << 20;

/// Starting points of the mutations: every command with most of its options.
const SEEDS: &[&str] = &[
    "read -v -P 7 -s 10 -l 20 1k 512",
    "read -b -q 0 512",
    "readv -C -P 0x10 0 1k 2k 3k",
    "aio_read -P 010 64k 1.5k",
    "aio_read -i 0 1",
    "write -P 255 1M 1",
    "write -z -u -n -f 0 128k",
    "write -c -s file 64k 64k",
    "write -b 512 1k",
    "writev -f 0 10 20 30",
    "aio_write -z -u 4k 8k",
    "aio_flush",
    "discard -Cq 512 64k",
    "alloc 0 1M",
    "a 512",
    "map",
    "length",
    "info",
    "flush",
    "truncate -m metadata 2M",
    "t -m full 1500000",
    "open -rsCnkU -t none -d unmap -i native -o a=b disk",
    "reopen -r -c writeback -o read-only=on,cache.direct=off",
    "reopen -w",
    "close",
    "help read",
    "sigraise 9",
    "sleep 0",
    "break l2_load A",
    "resume A",
    "remove_break A",
    "zone_append 0 512 512",
    "abort",
    "quit",
];

/// Pieces that mutations insert.
const PIECES: &[&str] = &[
    "-",
    "--",
    " ",
    "  ",
    "-P",
    "-q",
    "-z",
    "-n",
    "-s",
    "-l",
    "-m",
    "-o",
    "0",
    "1",
    "512",
    "-1",
    "0x",
    "0x7f",
    "8E",
    "7E",
    "9223372036854775807",
    "18446744073709551615",
    "1.5k",
    ".",
    "k",
    "é",
    "\u{0}",
    "\t",
    "\u{202e}",
    "🦀",
    ",",
    "=",
    "2147483136",
    "2G",
    "disk",
    "%s%n",
    "'",
    "\"",
    "\\",
];

fn mutated(rng: &mut Rng) -> String {
    let mut chars: Vec<char> = rng.pick(SEEDS).chars().collect();
    for _ in 0..rng.below(5) {
        let at = rng.below(chars.len() as u64 + 1) as usize;
        match rng.below(5) {
            0 => drop(chars.splice(at..at, rng.pick(PIECES).chars())),
            1 => chars.truncate(at),
            2 if at < chars.len() => drop(chars.remove(at)),
            3 if at < chars.len() => chars[at] = char::from_u32(rng.below(0x250) as u32).unwrap_or(' '),
            _ => {
                let other: Vec<char> = rng.pick(SEEDS).chars().collect();
                let from = rng.below(other.len() as u64) as usize;
                chars.splice(at..at, other[from..].iter().copied());
            }
        }
    }
    chars.into_iter().collect()
}

/// True if a test has the time and memory to run the command.
fn is_cheap(command: &Command) -> bool {
    match command {
        Command::Sleep { milliseconds } => *milliseconds == 0,
        Command::Truncate { size, .. } => *size <= MOST,
        Command::Write(write) => write.place != Place::VmState || write.range.len <= MOST,
        Command::Read(read) => !read.vm_state || read.range.len <= MOST,
        _ => true,
    }
}

struct Memory {
    storage: Arc<dyn Storage>,
    format: ImageFormat,
}

impl Opener for Memory {
    fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal> {
        let mut options = OpenOptions::default();
        options.writable = !request.read_only;
        let source = ResolvedSource::new(self.storage.clone(), self.format.clone(), "memory");
        let disk = qcow2_core::open_disk(source, &options);
        let disk = disk.map_err(|error| Refusal::new(error.to_string()))?;
        Ok(OpenedDisk::new(disk, options.writable))
    }

    fn read_file(&self, _: &str, limit: u64) -> std::io::Result<Vec<u8>> {
        Ok(vec![1; limit.min(3) as usize])
    }
}

/// Counts the bytes of the output.
#[derive(Default)]
struct Counter(Cell<usize>);

impl Console for Counter {
    fn out(&self, text: &str) {
        self.0.set(self.0.get() + text.len());
    }

    fn complain(&self, line: &str) {
        self.out(line);
    }

    fn complain_named(&self, text: &str) {
        self.out(text);
    }
}

#[test]
fn mutated_lines_parse_or_are_refused() {
    let mut rng = Rng::new(1);
    let mut understood = 0;
    for _ in 0..60_000 {
        let line = mutated(&mut rng);
        let words = split(&line);
        let Some(spec) = words.first().and_then(|name| find(name)) else { continue };
        if spec.check_count(words[0], words.len() - 1).is_err() {
            continue;
        }
        let Ok(command) = parse(spec, &words[1..]) else { continue };
        understood += 1;
        if let Command::Write(write) = &command {
            let zeroes = matches!(write.content, Content::Zeroes { .. });
            assert!(zeroes || write.range.len < 1 << 31, "{line}: {command:?}");
        }
    }
    assert!(understood > 10_000, "mutations that are too wild test little: {understood}");
}

#[test]
fn mutated_lines_run_or_are_refused() {
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::with_len(match format {
            ImageFormat::Raw => SIZE,
            _ => 0,
        }));
        if format == ImageFormat::Qcow2 {
            qcow2_core::create(&storage, None, &CreateOptions::new(SIZE)).unwrap();
        }
        let opener = Memory { storage: storage.clone(), format: format.clone() };
        let (counter, mut rng) = (Counter::default(), Rng::new(2));
        let words = |error: &(dyn std::error::Error + 'static)| error.to_string();
        let mut exerciser = Exerciser::new(Ports { opener: &opener, console: &counter, words: &words });
        let mut ends = 0;
        for _ in 0..4_000 {
            let line = mutated(&mut rng);
            let typed = split(&line);
            let spec = typed.first().and_then(|name| find(name));
            let command = spec.and_then(|spec| parse(spec, &typed[1..]).ok());
            // With a wrong number of words the command is refused before it runs, however expensive it looks.
            let counted = spec.is_none_or(|spec| spec.check_count(typed[0], typed.len() - 1).is_ok());
            if counted && command.is_some_and(|command| !is_cheap(&command)) {
                continue;
            }
            if matches!(exerciser.execute(&line), Flow::Quit | Flow::Abort) {
                ends += 1;
            }
            exerciser.execute("open disk");
        }
        exerciser.finish();
        assert!(ends > 10 && counter.0.get() > 100_000, "{format:?}: {ends} {}", counter.0.get());
        // Whatever the commands did, the disk still opens.
        match format {
            ImageFormat::Raw => drop(RawDisk::new(storage, false).unwrap()),
            _ => {
                let source = ResolvedSource::new(storage, ImageFormat::Qcow2, "memory");
                qcow2_core::open_disk(source, &OpenOptions::default()).unwrap();
            }
        }
    }
}
