//! The same requests for every library: what is read or written where, by how many threads, and the time.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

/// Bytes of a request.
pub const BLOCK: usize = 4096;

/// An error of any library.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// One run: `IMAGE read|write THREADS COUNT`.
#[derive(Clone, Debug)]
pub struct Task {
    /// The image.
    pub image: PathBuf,
    /// Writes, or reads.
    pub write: bool,
    /// Threads, or tasks.
    pub threads: u64,
    /// Requests of all threads together.
    pub count: u64,
}

impl Task {
    /// The task of the command line.
    pub fn from_args() -> Result<Self> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let [image, kind, threads, count] = &args[..] else {
            return Err("usage: IMAGE read|write THREADS COUNT".into());
        };
        let write = match &**kind {
            "read" => false,
            "write" => true,
            other => return Err(format!("{other}: read or write").into()),
        };
        Ok(Self { image: image.into(), write, threads: threads.parse()?, count: count.parse()? })
    }

    /// The offsets of a thread's requests on a disk of `size` bytes. Reads: at random, the same each time.
    /// Writes: each in a cluster of its own, in an order that is no order, so that each allocates one.
    pub fn offsets(&self, thread: u64, size: u64) -> impl Iterator<Item = u64> + use<> {
        const CLUSTER: u64 = 65_536;
        let (write, threads, count) = (self.write, self.threads, self.count / self.threads);
        let (blocks, clusters) = (size / BLOCK as u64, size / CLUSTER);
        // Odd and no multiple of anything: a walk through all of a power of two.
        let step = (clusters / 5 * 2) | 1;
        let mut state = thread + 1;
        (0..count).map(move |n| {
            if write {
                return (n * threads + thread).wrapping_mul(step) % clusters * CLUSTER;
            }
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % blocks * BLOCK as u64
        })
    }

    /// Runs `request` for each offset on threads; reads once before that, untimed, so that every library has
    /// in its cache what it keeps there. `end` is timed too. Prints the requests a second.
    pub fn run(
        &self,
        size: u64,
        request: impl Fn(u64, &mut [u8]) -> Result<()> + Sync,
        end: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let all = || -> Result<()> {
            thread::scope(|scope| {
                let work = |thread| {
                    let request = &request;
                    scope.spawn(move || {
                        let mut buffer = vec![7; BLOCK];
                        self.offsets(thread, size).try_for_each(|offset| request(offset, &mut buffer))
                    })
                };
                let threads: Vec<_> = (0..self.threads).map(work).collect();
                threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
            })
        };
        if !self.write {
            all()?;
        }
        let start = Instant::now();
        all()?;
        end()?;
        self.tell(start);
        Ok(())
    }

    /// Prints the requests a second since `start`.
    pub fn tell(&self, start: Instant) {
        let count = self.count / self.threads * self.threads;
        println!("{:.0}", count as f64 / start.elapsed().as_secs_f64());
    }
}
