//! Runs commands, one after the other, on the open disk.

mod breakpoints;
mod opening;

use crate::background::Background;
use crate::grammar::{
    self, Command, Complaint, Content, Manner, Range, Read, Spec, Write, find, parse, split,
};
use crate::outcome::Outcome;
use crate::port::{OpenedDisk, Ports};
use crate::reason::Reason;
use crate::reopening::Now;
use crate::report::{map_line, size};
use crate::request::OpenRequest;
use crate::source::Source;
use crate::target::Target;
use qcow2_blockdev::Driver;
use qcow2_core::{Image, ImageFormat, Preallocation};
use qcow2_io::OsError;
use qcow2_ops::info::info_past_end;
use std::time::Duration;

/// What the caller does after a line. The exerciser never touches its own process: sending signals and
/// aborting are left to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flow {
    /// Go on with the next line.
    Continue,
    /// `sigraise`: send this signal (1 or above) to the process, then go on with the next line.
    Raise(i32),
    /// `quit`: stop reading lines.
    Quit,
    /// `abort`: end the process as by a crash, without calling [`Exerciser::finish`].
    Abort,
}

/// Runs qemu-io's commands, one per line, on one disk at a time.
pub struct Exerciser<'a> {
    ports: Ports<'a>,
    open: Option<Open>,
    background: Background,
    failed: bool,
}

/// The open disk and the request that opened it.
struct Open {
    disk: OpenedDisk,
    target: Target,
    request: OpenRequest,
}

/// A command failed and its error has been printed.
struct Failed;

impl<'a> Exerciser<'a> {
    /// An exerciser without an open disk.
    pub fn new(ports: Ports<'a>) -> Self {
        Self { ports, open: None, background: Background::default(), failed: false }
    }

    /// Opens a disk like the command `open`. Returns true on success; otherwise the reason is on the console
    /// and [`has_failed`](Self::has_failed) is true.
    pub fn open(&mut self, request: OpenRequest) -> bool {
        let result = self.open_as(request, false);
        self.failed |= result.is_err();
        result.is_ok()
    }

    /// Runs one line: a command and its arguments, separated by spaces, without quoting. An empty line does
    /// nothing. All results and errors go to the console; a failure sets [`has_failed`](Self::has_failed).
    ///
    /// Background requests (`aio_read`, `aio_write`) run on threads of their own, at most 128 at a time; the
    /// outcome is printed after a later command. `sleep` and `wait_break` block the caller.
    pub fn execute(&mut self, line: &str) -> Flow {
        self.command(line).unwrap_or_else(|Failed| {
            self.failed = true;
            Flow::Continue
        })
    }

    /// Waits for background requests, prints their outcomes, and closes the disk. Call it after the last
    /// line: dropping an exerciser neither waits nor closes.
    pub fn finish(&mut self) {
        self.close();
    }

    /// True if any command failed. Failed background requests and a failed close don't
    /// count, as in qemu-io.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    fn command(&mut self, line: &str) -> Result<Flow, Failed> {
        let words = split(line);
        let Some((&name, words)) = words.split_first() else {
            return Ok(Flow::Continue);
        };
        let Some(spec) = find(name) else {
            return Err(self.complain(&format!("command \"{name}\" not found")));
        };
        // Three complaints in qemu-io's order: no disk, wrong number of words, read-only disk.
        if spec.needs_file && self.open.is_none() {
            return Err(self.complain("no file open, try 'help open'"));
        }
        spec.check_count(name, words.len()).map_err(|text| self.complain(&text))?;
        if spec.writes && self.open.as_ref().is_some_and(|open| !open.disk.writable) {
            return Err(self.complain_named("Block node is read-only"));
        }
        match parse(spec, words) {
            Ok(Command::Quit) => Ok(Flow::Quit),
            Ok(Command::Abort) => Ok(Flow::Abort),
            Ok(Command::Raise { signal }) if signal > 0 => Ok(Flow::Raise(signal)),
            Ok(command) => self.run(command).map(|()| Flow::Continue),
            Err(complaint) => Err(self.refuse(spec, name, complaint)),
        }
    }

    fn refuse(&self, spec: &Spec, typed: &str, complaint: Complaint) -> Failed {
        match complaint {
            Complaint::Out(text) => self.out(&format!("{text}\n")),
            Complaint::Named(text) => self.ports.console.complain_named(&text),
            Complaint::Usage(text) => {
                if let Some(text) = text {
                    self.ports.console.complain(&text);
                }
                self.out(&spec.usage(typed));
            }
        }
        Failed
    }

    fn run(&mut self, command: Command) -> Result<(), Failed> {
        match command {
            Command::Read(request) => self.read(request),
            Command::Write(request) => self.write(request),
            Command::Discard { range, style } => {
                self.foreground(range, |target| target.discard(range, style))
            }
            Command::Flush => self.flush(),
            Command::AioFlush => {
                let finished = self.background.wait();
                self.print_background(finished);
                Ok(())
            }
            Command::Alloc(range) => self.alloc(range),
            Command::Map => self.map(),
            Command::Truncate { size, preallocation } => self.truncate(size, preallocation.as_deref()),
            Command::Length => self.length(),
            Command::Info => self.info(),
            Command::Sleep { milliseconds } => {
                std::thread::sleep(Duration::from_millis(milliseconds));
                let finished = self.background.finished();
                self.print_background(finished);
                Ok(())
            }
            Command::Open(open) => self.open_command(open),
            Command::Close => {
                self.close();
                Ok(())
            }
            Command::Reopen(reopen) => self.reopen(reopen),
            Command::Help { command } => self.help(command.as_deref()),
            Command::Break(command) => self.breakpoint(command),
            Command::Inject(text) => {
                self.out(&format!("{text}\n"));
                Ok(())
            }
            Command::Impossible(text) => {
                self.out(&format!("{text}\n"));
                Err(Failed)
            }
            // `command` has handled these already, except signal 0, which does nothing.
            Command::Quit | Command::Abort | Command::Raise { .. } => Ok(()),
        }
    }

    fn target(&self) -> Result<&Target, Failed> {
        self.open.as_ref().map(|open| &open.target).ok_or(Failed)
    }

    /// Runs a request on `range` and prints the outcomes of background requests that have finished, then its
    /// own. A request that is refused waits for nothing, and so is told before any other.
    fn foreground(&mut self, range: Range, request: impl FnOnce(&Target) -> Outcome) -> Result<(), Failed> {
        let target = self.target()?;
        let (is_inside, outcome) = (target.is_inside(range), request(target));
        let failed = outcome.failed;
        if is_inside {
            let finished = self.background.finished();
            self.print_background(finished);
        }
        self.print(outcome);
        if failed { Err(Failed) } else { Ok(()) }
    }

    fn read(&mut self, request: Read) -> Result<(), Failed> {
        if request.manner != Manner::Background {
            return self.foreground(request.range, |target| target.read(&request));
        }
        let target = self.target()?.clone();
        self.in_background(target.is_inside(request.range), move || target.read(&request));
        Ok(())
    }

    fn write(&mut self, request: Write) -> Result<(), Failed> {
        let source = match self.source(&request) {
            Ok(source) => source,
            Err(complaint) => return self.foreground(request.range, |_| Outcome::complaint(complaint)),
        };
        if request.manner != Manner::Background {
            return self.foreground(request.range, |target| target.write(&request, source));
        }
        let target = self.target()?.clone();
        self.in_background(target.is_inside(request.range), move || target.write(&request, source));
        Ok(())
    }

    /// Starts a request. One that is not `possible` ends at once, and is told before whatever comes next.
    fn in_background(&mut self, possible: bool, request: impl FnOnce() -> Outcome + Send + 'static) {
        if !possible {
            return self.background.add_refused(request());
        }
        let finished = self.background.start(request);
        self.print_background(finished);
    }

    /// The data of a write. Errors: the line to print, if the file of `-s` is empty or cannot be read.
    fn source(&self, request: &Write) -> Result<Source, String> {
        match &request.content {
            Content::Zeroes { .. } => Ok(Source::byte(0)),
            Content::Byte(byte) => Ok(Source::byte(*byte)),
            Content::File(name) => match self.ports.opener.read_file(name, request.range.len) {
                Ok(bytes) => Source::repeated(bytes).ok_or_else(|| format!("{name}: file is empty")),
                Err(error) => Err(format!("{name}: {}", OsError::new(error))),
            },
        }
    }

    fn print(&self, outcome: Outcome) {
        if let Some(complaint) = outcome.complaint {
            self.ports.console.complain(&complaint);
        }
        if let Some((name, reason)) = outcome.refused {
            self.out(&format!("{name} failed: {}\n", self.reason(&reason)));
        }
        self.out(&outcome.text);
    }

    /// Prints the outcomes of background requests. Their failures don't set `failed`, as in qemu-io.
    fn print_background(&self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            self.print(outcome);
        }
    }

    fn length(&self) -> Result<(), Failed> {
        let target = self.target()?;
        if let Err(reason) = target.check_there() {
            self.out(&format!("getlength: {}\n", self.reason(&reason)));
            return Err(Failed);
        }
        self.out(&format!("{}\n", size(target.len())));
        Ok(())
    }

    fn flush(&self) -> Result<(), Failed> {
        let target = self.target()?;
        // Of a disk that is gone nothing is left to flush.
        let flushed = if target.check_there().is_err() { Ok(()) } else { target.disk.flush() };
        flushed
            .map_err(|error| self.complain(&format!("flush failed: {}", self.reason(&Reason::from(error)))))
    }

    fn alloc(&self, range: Range) -> Result<(), Failed> {
        match self.target()?.allocated(range) {
            Ok((sum, len)) => {
                let offset = size(range.offset);
                self.out(&format!("{sum}/{len} bytes allocated at offset {offset}\n"));
                Ok(())
            }
            Err(reason) => {
                self.out(&format!("is_allocated failed: {}\n", self.reason(&reason)));
                Err(Failed)
            }
        }
    }

    fn map(&self) -> Result<(), Failed> {
        let mut show = |range: Range, allocated| self.out(&map_line(range.offset, range.len, allocated));
        let target = self.target()?;
        if let Err(reason) = target.check_there() {
            return Err(
                self.complain_named(&format!("Failed to query image length: {}", self.reason(&reason)))
            );
        }
        target.map(&mut show).map_err(|reason| {
            self.complain_named(&format!("Failed to query allocation status: {}", self.reason(&reason)))
        })
    }

    fn truncate(&self, size: u64, preallocation: Option<&str>) -> Result<(), Failed> {
        let target = self.target()?;
        if target.check_there().is_err() {
            return Err(self.complain_named("No medium inserted"));
        }
        target.refuse_resize(size, preallocation).map_err(|text| self.complain_named(text))?;
        let mode = preallocation.and_then(Preallocation::from_name).unwrap_or_default();
        target.resize(size, mode).map_err(|error| {
            let lines = self.ports.words.not_resized(&error, mode, &*target.disk);
            if let Some((first, rest)) = lines.split_first() {
                self.ports.console.complain_named(first);
                rest.iter().for_each(|line| self.ports.console.complain(line));
            }
            Failed
        })
    }

    fn info(&self) -> Result<(), Failed> {
        let target = self.target()?;
        target.check_there().map_err(|_| Failed)?;
        let image = target.disk.as_image();
        let writable = self.open.as_ref().is_some_and(|open| open.disk.writable);
        let describe = |image: &Image| info_past_end(&**image.storage(), &ImageFormat::Qcow2);
        let details = match image.map(describe) {
            Some(Ok(mut report)) => {
                // Ours marks them at the first write. Scripts learn from the mark who holds them.
                let bitmaps = report.qcow2.iter_mut().flat_map(|info| &mut info.bitmaps);
                bitmaps.for_each(|bitmap| bitmap.in_use |= writable);
                report.qcow2.as_ref().map(|info| self.ports.words.details(info))
            }
            Some(Err(error)) => return Err(self.complain_named(&self.reason(&Reason::from(error)))),
            None => None,
        };
        let driver =
            self.open.as_ref().map_or(Driver::Raw, |open| Now::new(&open.request, &*target.disk).driver());
        // The name of a protocol is told as that and as a format's.
        let name =
            format!("format name: {}\n", driver.name()).repeat(if driver.is_protocol() { 2 } else { 1 });
        if matches!(driver, Driver::NullCo | Driver::NullAio) {
            self.out(&name);
            return Err(Failed);
        }
        self.out(&format!(
            "{name}cluster size: {}\nvm state offset: {}\n{}",
            size(target.disk.cluster_size()),
            size(target.vm_state_offset()),
            details.unwrap_or_default(),
        ));
        Ok(())
    }

    fn help(&self, command: Option<&str>) -> Result<(), Failed> {
        match command.map(|name| (name, find(name))) {
            None => self.out(&grammar::help_for_all()),
            Some((name, Some(spec))) => self.out(&grammar::help_for_one(spec, name)),
            Some((name, None)) => {
                self.out(&format!("command {name} not found\n"));
                return Err(Failed);
            }
        }
        Ok(())
    }

    fn reason(&self, reason: &Reason) -> String {
        reason.text(self.ports.words)
    }

    fn out(&self, text: &str) {
        self.ports.console.out(text);
    }

    fn complain(&self, line: &str) -> Failed {
        self.ports.console.complain(line);
        Failed
    }

    fn complain_named(&self, text: &str) -> Failed {
        self.ports.console.complain_named(text);
        Failed
    }
}
