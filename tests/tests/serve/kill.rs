//! The server is killed under load, and while its layers change: what was flushed is in the chain that was
//! recorded, and no check finds corruption.
//!
//! `QCOW2_KILLS` sets the number of kills (200 for a campaign), `QCOW2_SEED` the seed of the moments.

use super::{Client, OURS, Server, ours};
use qcow2_nbd::blocking::{Job, Transfer};
use qcow2_nbd::proto::{Command, command_flag};
use qcow2_testkit::oracle::Tool;
use qcow2_testkit::rng::Rng;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CLIENTS: u64 = 3;
/// Blocks that each client writes, and their size.
const BLOCKS: u64 = 1024;
const BLOCK: usize = 4096;
const SIZE: u64 = CLIENTS * BLOCKS * BLOCK as u64;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What one client has written: the stamps of each block, in their order, the first of which is the oldest
/// that may be there after a kill.
#[derive(Default)]
struct Written(BTreeMap<u64, Vec<u32>>);

impl Written {
    /// `stamp` is on its way to `block`.
    fn sent(&mut self, block: u64, stamp: u32) {
        self.0.entry(block).or_insert_with(|| vec![0]).push(stamp);
    }

    /// A flush was answered, and nothing was sent since it was asked for.
    fn flushed(&mut self) {
        self.0.values_mut().for_each(|stamps| drop(stamps.drain(..stamps.len() - 1)));
    }

    /// Panics if a sector is older than it may be, or was never written.
    fn check(&self, disk: &[u8]) {
        for (block, stamps) in &self.0 {
            let bytes = &disk[*block as usize * BLOCK..][..BLOCK];
            for (at, word) in bytes.chunks_exact(4).enumerate() {
                let seen = u32::from_be_bytes(word.try_into().unwrap());
                assert!(stamps.contains(&seen), "block {block}, word {at}: {seen} is none of {stamps:?}");
            }
        }
    }
}

/// Writes and flushes until the server is gone.
fn write(client: &Client, me: u64, seed: u64, done: &AtomicU64) -> Written {
    let mut rng = Rng::new(seed ^ me << 32);
    let mut written = Written::default();
    for stamp in 1.. {
        let block = me * BLOCKS + rng.below(BLOCKS);
        let (offset, len) = (block * BLOCK as u64, BLOCK as u64);
        let data = u32::to_be_bytes(stamp).repeat(BLOCK / 4);
        let (flush, durable) = (rng.one_in(12), rng.one_in(40));
        let answered = if flush {
            client.connection.run(&mut [Job::new(Command::FLUSH, 0, 0, Transfer::None)])
        } else {
            written.sent(block, stamp);
            let job = Job::new(Command::WRITE, offset, len, Transfer::Send(&data));
            client.connection.run(&mut [job.with_flags(if durable { command_flag::FUA } else { 0 })])
        };
        if answered.is_err() {
            break;
        }
        if flush {
            written.flushed();
        } else if durable {
            let stamps = written.0.get_mut(&block).unwrap();
            stamps.drain(..stamps.len() - 1);
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    written
}

/// A connection to the control socket.
struct Control(BufReader<UnixStream>);

impl Control {
    /// The answer to `command`, without its events; `None` if the server is gone.
    fn run(&mut self, command: &Value) -> Option<Value> {
        self.0.get_mut().write_all(format!("{command}\n").as_bytes()).ok()?;
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).ok().filter(|len| *len > 0)?;
            let answer: Value = serde_json::from_str(&line).ok()?;
            if answer.get("event").is_none() {
                return Some(answer);
            }
        }
    }
}

/// Changes the layers, one command after the other, until the server is gone. `depth`: layers below the top.
/// Notes in `now` what is under way.
fn change(mut control: Control, rng: &mut Rng, mut depth: u64, now: &Mutex<&'static str>) {
    for count in 0.. {
        let (name, command) = match rng.below(7) {
            6 => ("backup", json!({"command": "backup", "file": format!("b{count}")})),
            0 if depth > 0 => ("commit", json!({"command": "commit"})),
            1 | 2 if depth > 1 => ("commit below", json!({"command": "commit", "depth": 1})),
            3 => ("snapshot inside", json!({"command": "snapshot-save", "name": "inside"})),
            _ if depth < 5 => ("snapshot", json!({"command": "snapshot", "file": format!("n{count}")})),
            _ => ("commit", json!({"command": "commit"})),
        };
        *now.lock().unwrap() = name;
        let Some(answer) = control.run(&command) else { return };
        *now.lock().unwrap() = "nothing";
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        match name {
            "snapshot" => depth += 1,
            "commit" | "commit below" => depth -= 1,
            _ => {}
        }
    }
}

/// Kills a server at a moment that `seed` decides, as far as a moment can be decided. Returns what it was
/// doing besides serving.
fn kill(folder: &Path, seed: u64) -> &'static str {
    let mut rng = Rng::new(seed);
    ours(folder, &["create", "-q", "-f", "qcow2", "disk", &SIZE.to_string()]);
    let server = Server::start(folder, &["--control", "c", "--record", "top", "disk"]);
    let mut control = Control(BufReader::new(UnixStream::connect(folder.join("c")).unwrap()));
    let depth = rng.below(4);
    for layer in 0..depth {
        control.run(&json!({"command": "snapshot", "file": format!("s{layer}")})).unwrap();
    }
    let clients: Vec<Client> = (0..CLIENTS).map(|_| server.connect()).collect();
    let (done, now) = (AtomicU64::new(0), Mutex::new("nothing"));
    let (enough, late) = (rng.below(3000), Duration::from_micros(rng.below(20_000)));
    let is_calm = rng.one_in(4);
    let (written, doing) = std::thread::scope(|scope| {
        let (done, now) = (&done, &now);
        let writers: Vec<_> = (0..)
            .zip(&clients)
            .map(|(me, client)| scope.spawn(move || write(client, me, seed, done)))
            .collect();
        if !is_calm {
            scope.spawn(move || change(control, &mut rng, depth, now));
        }
        // On a busy machine fewer requests have to do.
        let begun = Instant::now();
        while done.load(Ordering::Relaxed) < enough && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(late);
        let doing = *now.lock().unwrap();
        server.kill();
        (writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>(), doing)
    });
    judge(folder, &written);
    doing
}

/// The recorded chain opens, has what was flushed, and no layer is damaged.
fn judge(folder: &Path, written: &[Written]) {
    let recorded = fs::read_to_string(folder.join("top")).unwrap_or_else(|_| "qcow2 disk\n".to_owned());
    let (format, top) = recorded.trim_end().split_once(' ').unwrap();
    ours(folder, &["convert", "-f", format, "-O", "raw", top, "content"]);
    let content = fs::read(folder.join("content")).unwrap();
    written.iter().for_each(|written| written.check(&content));
    let chain: Value =
        serde_json::from_str(&ours(folder, &["info", "--backing-chain", "--output=json", top])).unwrap();
    for layer in chain.as_array().unwrap() {
        let file = layer["filename"].as_str().unwrap();
        let checked = Tool::at(OURS).run_in(folder, &["check", file]);
        // Clusters that leak are what a kill may leave.
        assert!(matches!(checked.code, Some(0 | 3)), "{file}: {checked}");
    }
    // And it goes on.
    let server = Server::start_again(folder, &["--control", "c", "--record", "top", "disk"]);
    assert!(server.connect().read(0, content.len()) == content);
    assert!(server.end("-TERM").success());
    ours(folder, &["check", "-q", "-r", "leaks", top]);
}

#[test]
fn nothing_flushed_is_lost_when_the_server_is_killed() {
    let (kills, first) = (number("QCOW2_KILLS", 5), number("QCOW2_SEED", 1));
    let mut doing = BTreeMap::<&str, u64>::new();
    for seed in first..first + kills {
        let folder = tempfile::tempdir().unwrap();
        let killed = std::panic::catch_unwind(|| kill(folder.path(), seed));
        match killed {
            Ok(during) => *doing.entry(during).or_default() += 1,
            Err(_) => panic!("QCOW2_SEED={seed}, and the files are in {}", folder.keep().display()),
        }
    }
    println!("killed while the server did besides serving: {doing:?}");
}
