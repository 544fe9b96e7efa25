//! Work that shows how far it is and stops when a signal asks.
//!
//! `cargo run -p qcow2-terminal --example progress`
use qcow2_ops::Progress;
use qcow2_terminal::{Audience, Interrupts, Meter};
use std::time::Duration;

struct Program;

impl Audience for Program {
    fn draws(&self) -> bool {
        std::io::IsTerminal::is_terminal(&std::io::stderr())
    }
}

fn main() {
    let interrupts = Interrupts::install();
    let meter = Meter::waiting(&Program, &interrupts, true);
    meter.set_total(20);
    for _ in 0..20 {
        if meter.should_stop() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
        meter.advance(1);
    }
    let _ = meter.finish(Ok::<(), ()>(()));
}
