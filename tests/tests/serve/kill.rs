//! The server killed under load: what was flushed is there, and a check finds no corruption.

use super::{Server, folder, ours};
use qcow2_testkit::rng::Rng;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Blocks of 4 KiB in 16 MiB of the disk, for each of three clients.
const BLOCKS: u64 = 4096;

/// One client's writes: every block's last stamp, and the least that must be there after a kill.
#[derive(Default)]
struct Written {
    last: BTreeMap<u64, u32>,
    flushed: BTreeMap<u64, u32>,
}

fn work(server: &Server, client: u64, requests: u32, written: &Mutex<Written>) {
    let connection = server.connect();
    let mut rng = Rng::new(client + u64::from(requests));
    for stamp in 1..=requests {
        if rng.below(12) == 0 {
            connection.flush();
            let mut written = written.lock().unwrap();
            written.flushed = written.last.clone();
            continue;
        }
        let block = client * BLOCKS + rng.below(BLOCKS);
        connection.write(block * 4096, &stamp.to_be_bytes().repeat(1024));
        written.lock().unwrap().last.insert(block, stamp);
    }
    connection.flush();
    let mut written = written.lock().unwrap();
    written.flushed = written.last.clone();
}

#[test]
fn nothing_flushed_is_lost_when_the_server_is_killed() {
    for seed in 0..4 {
        let folder = folder();
        let root = folder.path();
        let server = Server::start(root, &["disk"]);
        let written: [Mutex<Written>; 3] = Default::default();
        std::thread::scope(|scope| {
            for (client, written) in (0..).zip(&written) {
                let server = &server;
                // The last one goes on until the others have done enough: a kill then cuts into its work.
                let requests = 200 + seed * 131 + client as u32 * 50;
                scope.spawn(move || work(server, client, requests, written));
            }
        });
        // A few more that nobody flushes, on all connections at once.
        let late = server.connect();
        (0..40).for_each(|block| late.write(48 << 20 | block << 12, &[1; 4096]));
        server.end("-KILL");
        ours(root, &["check", "-q", "-r", "leaks", "disk"]);
        ours(root, &["convert", "-f", "qcow2", "-O", "raw", "disk", "raw"]);
        let content = std::fs::read(root.join("raw")).unwrap();
        for written in &written {
            let written = written.lock().unwrap();
            for (block, stamp) in &written.flushed {
                let at = *block as usize * 4096;
                assert_eq!(
                    content[at..at + 4096],
                    stamp.to_be_bytes().repeat(1024),
                    "seed {seed} block {block}"
                );
            }
        }
    }
}
