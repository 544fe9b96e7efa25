//! `break`, `resume`, `remove_break`, `wait_break`: breakpoints of a blkdebug driver below the disk.

use super::{Exerciser, Failed};
use crate::grammar::Break;
use crate::reason::{NOT_FOUND, NOT_SUPPORTED};
use qcow2_core::Event;
use qcow2_io::{Debugger, StopNews, os_error_text};

impl Exerciser<'_> {
    pub(super) fn breakpoint(&self, command: Break) -> Result<(), Failed> {
        let debugger = self.open.as_ref().and_then(|open| open.disk.debugger.as_deref());
        let Some(debugger) = debugger else {
            return Err(self.no_breakpoint(&command, NOT_SUPPORTED));
        };
        let done = match &command {
            Break::Set { event, tag } => match Event::parse(event) {
                Some(event) => {
                    debugger.set_breakpoint(event, tag);
                    true
                }
                None => false,
            },
            Break::Remove { tag } => debugger.remove_breakpoint(tag),
            Break::Resume { tag } => debugger.resume(tag),
            Break::Wait { tag } => {
                debugger.wait_stopped(tag);
                true
            }
        };
        self.print_stops(debugger);
        if done { Ok(()) } else { Err(self.no_breakpoint(&command, NOT_FOUND)) }
    }

    fn no_breakpoint(&self, command: &Break, code: i32) -> Failed {
        let why = os_error_text(code);
        let text = match command {
            Break::Set { .. } => format!("Could not set breakpoint: {why}"),
            Break::Remove { tag } => format!("Could not remove breakpoint {tag}: {why}"),
            Break::Resume { .. } => format!("Could not resume request: {why}"),
            Break::Wait { .. } => format!("Could not wait for a request: {why}"),
        };
        self.out(&format!("{text}\n"));
        Failed
    }

    fn print_stops(&self, debugger: &Debugger) {
        for news in debugger.take_news() {
            self.out(&match news {
                StopNews::Stopped(tag) => format!("blkdebug: Suspended request '{tag}'\n"),
                StopNews::Resumed(tag) => format!("blkdebug: Resuming request '{tag}'\n"),
            });
        }
    }
}
