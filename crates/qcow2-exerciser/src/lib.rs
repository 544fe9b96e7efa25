//! qemu-io as a library: lines of text that read, write and examine a disk.
//!
//! A line is a command of qemu-io (`write -P 7 0 64k`); `help` lists them all. The [`Exerciser`] runs it on
//! the open disk and reports the result in qemu-io's format. It uses no file, terminal or process itself:
//!
//! ```text
//!              a line                       Ports
//!                |            +-------------------------------------+
//!                v            | Opener    a name  -> an opened disk |
//!          +-----------+      | Console   text, complaints          |
//!          | Exerciser | ---> | Words     an error -> its text      |
//!          +-----------+      +-------------------------------------+
//!                |
//!                v
//!      what the caller does next (Flow): the next line, the end, send a signal
//! ```
//!
//! | need | here |
//! |---|---|
//! | run commands | [`Exerciser::execute`] |
//! | open disks by name, in memory, on a server | an [`Opener`]: returns an [`OpenedDisk`] or a [`Refusal`] |
//! | the options to open a disk with: read-only, cache mode, ... | [`OpenRequest`] |
//! | send the output to a string, a terminal, a log | a [`Console`] |
//! | time requests at a queue depth, as qemu-img's `bench` | [`Bench`] |
//! | word the errors yourself | [`Words`]; any function from an error to its text is one |
//!
//! ```
//! use qcow2_core::{CreateOptions, ImageFormat, OpenOptions, ResolvedSource, Storage};
//! use qcow2_exerciser::{Console, Exerciser, OpenRequest, OpenedDisk, Opener, Ports, Refusal};
//! use qcow2_io::MemoryStorage;
//! use std::cell::RefCell;
//! use std::sync::Arc;
//!
//! /// Opens one image in memory, whatever the name.
//! struct Memory(Arc<dyn Storage>);
//!
//! impl Opener for Memory {
//!     fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal> {
//!         let source = ResolvedSource::new(self.0.clone(), ImageFormat::Qcow2, "memory");
//!         let mut options = OpenOptions::default();
//!         options.writable = !request.read_only;
//!         let disk = qcow2_core::open_disk(source, &options);
//!         let disk = disk.map_err(|error| Refusal::new(error.to_string()))?;
//!         Ok(OpenedDisk::new(disk, options.writable))
//!     }
//! }
//!
//! #[derive(Default)]
//! struct Text(RefCell<String>);
//!
//! impl Console for Text {
//!     fn out(&self, text: &str) {
//!         self.0.borrow_mut().push_str(text);
//!     }
//!     fn complain(&self, line: &str) {
//!         self.out(&format!("{line}\n"));
//!     }
//!     fn complain_named(&self, text: &str) {
//!         self.complain(&format!("example: {text}"));
//!     }
//! }
//!
//! let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
//! qcow2_core::create(&storage, None, &CreateOptions::new(1 << 20))?;
//! let (memory, text) = (Memory(storage), Text::default());
//! let words = |error: &(dyn std::error::Error + 'static)| error.to_string();
//! let mut exerciser = Exerciser::new(Ports { opener: &memory, console: &text, words: &words });
//!
//! assert!(exerciser.open(OpenRequest::default()));
//! exerciser.execute("write -P 7 0 64k");
//! exerciser.execute("read -P 7 0 64k");
//! assert!(!exerciser.has_failed());
//! exerciser.execute("read -P 8 512 1k");
//! assert!(exerciser.has_failed());
//! exerciser.finish();
//!
//! let text = text.0.take();
//! let lines: Vec<&str> = text.lines().filter(|line| !line.contains("ops/sec")).collect();
//! assert_eq!(
//!     lines,
//!     [
//!         "wrote 65536/65536 bytes at offset 0",
//!         "read 65536/65536 bytes at offset 0",
//!         "Pattern verification failed at offset 512, 1024 bytes",
//!         "read 1024/1024 bytes at offset 512",
//!     ]
//! );
//! # Ok::<(), qcow2_core::Error>(())
//! ```
#![forbid(unsafe_code)]

mod background;
mod bench;
mod exerciser;
mod files;
mod grammar;
mod outcome;
mod port;
mod reason;
mod reopening;
mod report;
mod request;
mod source;
mod target;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod totality;

pub use bench::{Bench, BenchFailure, BenchRefusal, BenchReport};
pub use exerciser::{Exerciser, Flow};
pub use files::{FilesError, OpenedFiles, open_files};
pub use port::{Console, OpenedDisk, Opener, Ports, Refusal, Words};
pub use reason::system_text;
pub use request::{OpenRequest, RequestError};
