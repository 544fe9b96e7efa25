//! Runs qemu-io commands on an image in memory: one per argument, or a built-in sequence without arguments.
//!
//!     cargo run -p qcow2-exerciser --example exercise -- "write -P 7 0 1M" "map" "read -v 0 32"
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example prints")]

use qcow2_core::{CreateOptions, ImageFormat, OpenOptions, ResolvedSource, Storage};
use qcow2_exerciser::{Console, Exerciser, Flow, OpenRequest, OpenedDisk, Opener, Ports, Refusal};
use qcow2_io::MemoryStorage;
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

/// The image file; every name opens it.
struct InMemory(Arc<dyn Storage>);

impl Opener for InMemory {
    fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal> {
        let mut options = OpenOptions::default();
        options.writable = !request.read_only;
        let source = ResolvedSource::new(self.0.clone(), ImageFormat::Qcow2, "memory");
        let disk = qcow2_core::open_disk(source, &options);
        Ok(OpenedDisk::new(disk.map_err(|error| Refusal::new(error.to_string()))?, options.writable))
    }
}

struct Terminal;

impl Console for Terminal {
    fn out(&self, text: &str) {
        print!("{text}");
    }

    fn complain(&self, line: &str) {
        eprintln!("{line}");
    }

    fn complain_named(&self, text: &str) {
        eprintln!("exercise: {text}");
    }
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    qcow2_core::create(&storage, None, &CreateOptions::new(64 << 20))?;
    let image = InMemory(storage);
    let words = |error: &(dyn Error + 'static)| error.to_string();
    let mut exerciser = Exerciser::new(Ports { opener: &image, console: &Terminal, words: &words });
    exerciser.open(OpenRequest::default());

    let given: Vec<String> = std::env::args().skip(1).collect();
    let lines = match given.is_empty() {
        true => {
            ["write -P 7 0 1M", "write -z 64k 64k", "read -v 65528 16", "map"].map(str::to_owned).to_vec()
        }
        false => given,
    };
    for line in &lines {
        println!("> {line}");
        if exerciser.execute(line) == Flow::Quit {
            break;
        }
    }
    exerciser.finish();
    Ok(if exerciser.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
