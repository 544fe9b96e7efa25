//! What a program has around it while it works on images: signals that ask it to stop, somebody who wants to
//! see how far it is, and a person who knows passwords.
//!
//! | you want to | take |
//! |---|---|
//! | stop at the next good place when a signal asks, and take away what is half made | [`Interrupts`] |
//! | show how far a procedure is, as percentages, as a bar or as JSON | [`Meter`] |
//! | ask for passwords that no option names | [`Terminal`] |
//!
//! Everything is written to standard output and standard error of the process.
//!
//! ```
//! use qcow2_ops::Progress;
//! use qcow2_terminal::{Audience, Interrupts, Meter};
//!
//! struct Program;
//! impl Audience for Program {}
//!
//! let interrupts = Interrupts::default();
//! let meter = Meter::waiting(&Program, &interrupts, false);
//! meter.set_total(100);
//! meter.advance(50);
//! assert!(!meter.should_stop());
//! meter.finish(Ok::<(), ()>(())).unwrap();
//! ```
#![forbid(unsafe_code)]

mod interrupt;
mod progress;
mod prompt;

pub use interrupt::{Interrupts, on_stop, outlive_harmless_signals};
pub use progress::{Audience, Meter, PERCENT};
pub use prompt::Terminal;
