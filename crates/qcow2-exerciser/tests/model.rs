//! Random commands compared with a byte array: reads, dumps and verification show what was written.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

mod common;

use common::{OneDisk, Transcript, words};
use qcow2_exerciser::{Exerciser, Flow, OpenRequest, Ports};
use qcow2_io::MemoryStorage;
use qcow2_testkit::rng::Rng;
use std::sync::Arc;

const SIZE: u64 = 300 * 1024 + 512;
const COMMANDS: u32 = 400;

/// The expected content of the disk.
struct Model {
    rng: Rng,
    bytes: Vec<u8>,
    /// True for an image, whose size is a multiple of 512.
    is_image: bool,
}

impl Model {
    fn range(&mut self) -> (usize, usize) {
        let size = self.bytes.len() as u64;
        let offset = self.rng.below(size);
        let most = if self.rng.one_in(4) { size } else { 3000 };
        let len = self.rng.below(most.min(size - offset) + 1);
        (offset as usize, len as usize)
    }

    /// The next line, already applied to the model, and its expected output.
    fn next(&mut self) -> (String, Vec<String>) {
        let (offset, len) = self.range();
        let byte = self.rng.below(4) as u8;
        let report = |verb: &str| vec![format!("{verb} {len}/{len} bytes at offset {offset}")];
        match self.rng.below(10) {
            0..=2 => {
                self.bytes[offset..offset + len].fill(byte);
                let (line, verb) = self.rng.pick(&[("write", "wrote"), ("writev", "wrote")]);
                (format!("{line} -P {byte} {offset} {len}"), report(verb))
            }
            3 => {
                self.bytes[offset..offset + len].fill(0);
                let unmap = self.rng.pick(&["", "u"]);
                (format!("write -z{unmap} {offset} {len}"), report("wrote"))
            }
            4 => {
                self.bytes[offset..offset + len].fill(byte);
                (format!("aio_write -q -P {byte} {offset} {len}"), Vec::new())
            }
            5 => {
                let mut expected = report("read");
                if self.bytes[offset..offset + len].iter().any(|b| *b != byte) {
                    expected
                        .insert(0, format!("Pattern verification failed at offset {offset}, {len} bytes"));
                }
                (format!("read -P {byte} {offset} {len}"), expected)
            }
            6..=7 => {
                let len = len.min(100);
                let lines = self.bytes[offset..offset + len].chunks(16).enumerate();
                let mut expected: Vec<String> = lines
                    .map(|(at, line)| {
                        let hex: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
                        format!("{:08x}:  {hex} {}", offset + at * 16, ".".repeat(line.len()))
                    })
                    .collect();
                expected.push(format!("read {len}/{len} bytes at offset {offset}"));
                (format!("read -v {offset} {len}"), expected)
            }
            8 => {
                let size = SIZE - 512 * self.rng.below(200);
                let size = if self.is_image { size } else { size - self.rng.below(2) * 100 };
                self.bytes.resize(size as usize, 0);
                (format!("truncate {size}"), Vec::new())
            }
            _ => (self.rng.pick(&["flush", "reopen", "reopen -c none", "aio_flush"]).to_owned(), Vec::new()),
        }
    }
}

#[track_caller]
fn check(name: &str, seed: u64, disk: &OneDisk, is_image: bool, start: Vec<u8>) {
    let text = Transcript::default();
    let mut exerciser = Exerciser::new(Ports { opener: disk, console: &text, words: &words });
    let mut request = OpenRequest::default();
    request.copy_on_read = seed.is_multiple_of(2);
    assert!(exerciser.open(request), "{}", text.take());
    let mut model = Model { rng: Rng::new(seed), bytes: start, is_image };
    for number in 0..COMMANDS {
        let (line, expected) = model.next();
        assert_eq!(exerciser.execute(&line), Flow::Continue);
        // Background requests could overlap the next command, which is not what this test is about.
        exerciser.execute("aio_flush");
        let said = text.take();
        // The line with times and rates is not compared.
        let said: Vec<&str> = said.lines().filter(|line| !line.ends_with(", 1")).collect();
        assert_eq!(said, expected, "{name}, seed {seed}, command {number}: {line}");
    }
    exerciser.finish();
}

#[test]
fn random_commands_match_a_byte_array() {
    let below: Vec<u8> = (0..SIZE).map(|at| (at / 7 % 4) as u8).collect();
    for seed in 0..6 {
        let storage = || Arc::new(MemoryStorage::new());
        let zeroes = vec![0; SIZE as usize];
        let raw = OneDisk::raw(Arc::new(MemoryStorage::with_len(SIZE)));
        check("raw", seed, &raw, false, zeroes.clone());
        check("small clusters", seed, &OneDisk::qcow2(storage(), SIZE, 512, None), true, zeroes.clone());
        check("clusters", seed, &OneDisk::qcow2(storage(), SIZE, 65536, None), true, zeroes);
        let overlay = OneDisk::qcow2(storage(), SIZE, 4096, Some(below.clone()));
        check("overlay", seed, &overlay, true, below.clone());
    }
}
