//! Progress on the command line: qemu-img's percentages, or a bar for a person at a terminal.

use crate::interrupt::Interrupts;
use indicatif::{ProgressBar, ProgressStyle};
use qcow2_ops::Progress;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// For whom a program works.
pub trait Audience {
    /// Whether a person looks at the terminal, for whom a bar may be drawn.
    fn draws(&self) -> bool {
        false
    }

    /// Whether the program stands in for qemu-img, and shows what that shows.
    fn is_drop_in(&self) -> bool {
        false
    }
}

/// Shows how far a procedure is, and tells it to stop when a signal asks.
#[derive(Debug)]
pub struct Meter {
    interrupts: Interrupts,
    shape: Shape,
    begun: AtomicBool,
    total: AtomicU64,
    done: AtomicU64,
    /// The share shown last, in the unit of `PERCENT`.
    shown: AtomicU64,
    /// More than this must be new to be shown, in the same unit.
    step: u64,
}

#[derive(Debug)]
enum Shape {
    /// A line on standard error for each SIGUSR1.
    OnRequest,
    /// Never shown: standard output is for data.
    Silent,
    /// A line of JSON on standard error, for programs.
    Json,
    /// `    (12.34/100%)` and a carriage return, on standard output. SIGUSR1 changes nothing.
    Percent,
    Bar(ProgressBar),
}

impl Meter {
    /// `wanted`: whether `-p` was given (and not `-q`). `json`: lines for programs are wanted instead.
    pub fn new(audience: &dyn Audience, interrupts: &Interrupts, wanted: bool, json: bool) -> Self {
        if json {
            return Self::beside_data(audience, interrupts, wanted, true);
        }
        let meter = Self::waiting(audience, interrupts, wanted);
        meter.begin();
        meter
    }

    /// With more than this between two outputs, in the unit of `PERCENT`.
    pub fn in_steps_of(self, step: u64) -> Self {
        Self { step, ..self }
    }

    /// The same, but nothing is shown before the work begins: for procedures that open their images.
    pub fn waiting(audience: &dyn Audience, interrupts: &Interrupts, wanted: bool) -> Self {
        let shape = match wanted {
            false => Shape::OnRequest,
            true if audience.draws() => Shape::Bar(bar()),
            true => Shape::Percent,
        };
        let (begun, [total, done, shown]) = Default::default();
        Self { interrupts: interrupts.clone(), shape, begun, total, done, shown, step: PERCENT }
    }

    /// Shows that nothing is done yet, if that is not shown already.
    pub fn begin(&self) {
        if !self.begun.swap(true, Ordering::Relaxed) {
            self.show(0);
        }
    }

    /// For verbs without `-p`: SIGUSR1 asks. In place of qemu-img, which shows nothing then, they do as it
    /// does.
    pub fn unasked(audience: &dyn Audience, interrupts: &Interrupts) -> Self {
        let shape = if audience.is_drop_in() { Shape::Silent } else { Shape::OnRequest };
        Self { shape, begun: true.into(), step: ALL, ..Self::waiting(audience, interrupts, false) }
    }

    /// For verbs that have data for standard output, where progress must not go. `json`: lines for programs
    /// are wanted.
    pub fn beside_data(audience: &dyn Audience, interrupts: &Interrupts, wanted: bool, json: bool) -> Self {
        let shape = match (json, wanted && audience.draws()) {
            (true, _) => Shape::Json,
            (false, true) => Shape::Bar(bar()),
            (false, false) => Shape::Silent,
        };
        Self { shape, begun: true.into(), ..Self::waiting(audience, interrupts, false) }
    }

    /// Shows that all is done, if that is not shown already.
    pub fn complete(&self) {
        if self.shown.swap(ALL, Ordering::Relaxed) < ALL {
            self.complete_again();
        }
    }

    /// Shows that all is done.
    pub fn complete_again(&self) {
        match &self.shape {
            Shape::Bar(bar) => bar.set_position(bar.length().unwrap_or(0)),
            _ => self.show(ALL),
        }
    }

    /// Ends the line, whether or not all is done.
    pub fn end(&self) {
        match &self.shape {
            Shape::OnRequest | Shape::Silent | Shape::Json => {}
            Shape::Percent => write_out("\n"),
            Shape::Bar(bar) => bar.abandon(),
        }
    }

    /// Ends the line of a procedure that came out as `done`, and the program where a signal asked for that.
    pub fn finish<T, E>(&self, done: Result<T, E>) -> Result<T, E> {
        if done.is_ok() {
            self.complete_again();
        }
        self.end();
        self.interrupts.die_if_asked();
        done
    }

    /// The same, with all done only where the work had begun. In place of qemu-img that is also shown of work
    /// that failed.
    pub fn finish_begun<T, E>(&self, audience: &dyn Audience, done: Result<T, E>) -> Result<T, E> {
        if self.begun.load(Ordering::Relaxed) && (done.is_ok() || audience.is_drop_in()) {
            self.complete_again();
        }
        self.end();
        self.interrupts.die_if_asked();
        done
    }

    fn show(&self, share: u64) {
        match self.shape {
            Shape::Percent => write_out(&format!("{}\r", percent(share))),
            Shape::OnRequest => self.answer(share),
            Shape::Json => {
                let (total, done) = (self.total.load(Ordering::Relaxed), self.done.load(Ordering::Relaxed));
                let done = if share == ALL { total } else { done.min(total) };
                // Nobody is left to hear of it where this fails.
                let _ = writeln!(io::stderr().lock(), "{{\"done\": {done}, \"total\": {total}}}");
            }
            _ => {}
        }
    }

    /// Says how far the work is, if somebody has asked since the last answer.
    fn answer(&self, share: u64) {
        if self.interrupts.take_progress_request() && matches!(self.shape, Shape::OnRequest) {
            // Nobody is left to hear of it where this fails.
            let _ = writeln!(io::stderr().lock(), "{}", percent(share));
        }
    }
}

impl Progress for Meter {
    fn set_total(&self, bytes: u64) {
        self.begin();
        self.total.store(bytes, Ordering::Relaxed);
        if let Shape::Bar(bar) = &self.shape {
            bar.set_length(bytes);
        }
    }

    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if let Shape::Bar(bar) = &self.shape {
            bar.set_position(done);
        }
        let total = self.total.load(Ordering::Relaxed).max(1);
        let share =
            u64::try_from(u128::from(done) * u128::from(ALL) / u128::from(total)).unwrap_or(ALL).min(ALL);
        self.answer(share);
        let shown = self.shown.load(Ordering::Relaxed);
        let due = share > shown + self.step || (share == ALL && shown < ALL);
        let first =
            |()| self.shown.compare_exchange(shown, share, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        // Whoever is first also prints first: a share never follows a larger one.
        let _turn = (due && matches!(self.shape, Shape::Percent)).then(|| io::stdout().lock());
        if due && first(()) {
            self.show(share);
        }
    }

    fn should_stop(&self) -> bool {
        self.interrupts.should_stop()
    }
}

fn percent(share: u64) -> String {
    let hundredths = (share as f64 / HUNDREDTH as f64).round_ties_even() as u64;
    format!("    ({}.{:02}/100%)", hundredths / 100, hundredths % 100)
}

/// A reader that has gone away does not stop the work.
fn write_out(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template =
        "{wide_bar} {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// One percent, in millionths of it.
pub const PERCENT: u64 = 1_000_000;
/// A hundredth of it, as it is shown.
const HUNDREDTH: u64 = PERCENT / 100;
/// Everything.
const ALL: u64 = 100 * PERCENT;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages() {
        assert_eq!(percent(0), "    (0.00/100%)");
        assert_eq!(percent(12_341_234), "    (12.34/100%)");
        assert_eq!(percent(66_666_666), "    (66.67/100%)");
        // As the C library rounds.
        assert_eq!([percent(15_625_000), percent(17_187_500)], ["    (15.62/100%)", "    (17.19/100%)"]);
        assert_eq!(percent(ALL), "    (100.00/100%)");
    }
}
