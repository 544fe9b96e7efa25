//! Runs commands one after the other on the disk that is open.

use super::background::Background;
use super::command::{Break, Command, Manner, Open, Range, Read, Reopen, Write};
use super::console::Console;
use super::help;
use super::parse::{Complaint, parse};
use super::report::{map_line, size};
use super::request::{OpenRequest, changed, request_of};
use super::table::{Spec, find};
use super::target::{Outcome, Target};
use super::words::split;
use qcow2_core::Event;
use qcow2_io::{Debugger, StopNews, os_error_text};
use std::sync::Arc;
use std::time::Duration;

/// An open disk.
pub(super) struct OpenedFile {
    /// What requests go to.
    pub(super) target: Target,
    /// Whether it may be changed.
    pub(super) writable: bool,
    /// What `info` shows.
    pub(super) info: Box<dyn Fn() -> Result<String, String>>,
    /// Lines for standard error.
    pub(super) warnings: Vec<String>,
    /// The way to breakpoints, where there is one.
    pub(super) debugger: Option<Arc<Debugger>>,
}

/// Opens disks. Errors: the lines for standard error, the first without the program's name.
pub(super) trait Opener {
    /// Opens what `request` asks for.
    fn open(&self, request: &OpenRequest) -> Result<OpenedFile, Vec<String>>;
}

/// What comes after a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// The next one.
    Continue,
    /// The end.
    Quit,
}

/// The program's state between commands.
pub(super) struct Exerciser<'a> {
    console: Console<'a>,
    opener: &'a dyn Opener,
    file: Option<(OpenedFile, OpenRequest)>,
    background: Background,
    failed: bool,
}

/// A command that failed; all was said already.
struct Failed;

impl<'a> Exerciser<'a> {
    /// Nothing is open.
    pub(super) fn new(console: Console<'a>, opener: &'a dyn Opener) -> Self {
        Self { console, opener, file: None, background: Background::default(), failed: false }
    }

    /// Whether any command failed.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Where text goes.
    pub(super) fn console(&mut self) -> &mut Console<'a> {
        &mut self.console
    }

    /// Runs one line.
    pub(super) fn execute(&mut self, line: &str) -> Flow {
        self.command(line).unwrap_or_else(|Failed| {
            self.failed = true;
            Flow::Continue
        })
    }

    /// Waits for requests in the background and closes the disk.
    pub(super) fn finish(&mut self) {
        if self.close().is_err() {
            self.failed = true;
        }
    }

    fn command(&mut self, line: &str) -> Result<Flow, Failed> {
        let words = split(line);
        let Some((&name, words)) = words.split_first() else {
            return Ok(Flow::Continue);
        };
        let Some(spec) = find(name) else {
            return self.complain(&format!("command \"{name}\" not found"));
        };
        if spec.needs_file && self.file.is_none() {
            return self.complain("no file open, try 'help open'");
        }
        if let Err(text) = spec.check_count(name, words.len()) {
            return self.complain(&text);
        }
        if spec.writes && self.file.as_ref().is_some_and(|(file, _)| !file.writable) {
            return self.complain_named("Block node is read-only");
        }
        match parse(spec, words) {
            Ok(Command::Quit) => Ok(Flow::Quit),
            Ok(command) => self.run(command).map(|()| Flow::Continue),
            Err(complaint) => self.refuse(spec, name, complaint),
        }
    }

    fn refuse(&mut self, spec: &Spec, typed: &str, complaint: Complaint) -> Result<Flow, Failed> {
        match complaint {
            Complaint::Out(text) => self.console.out(&format!("{text}\n")),
            Complaint::Named(text) => self.console.named(&text),
            Complaint::Usage(text) => {
                if let Some(text) = text {
                    self.console.err(&text);
                }
                self.console.out(&spec.usage(typed));
            }
        }
        Err(Failed)
    }

    fn run(&mut self, command: Command) -> Result<(), Failed> {
        match command {
            Command::Read(request) => self.read(request),
            Command::Write(request) => self.write(request),
            Command::Discard { range, style } => self.foreground(|target| target.discard(range, style)),
            Command::Flush => self.flush(),
            Command::AioFlush => {
                let finished = self.background.wait();
                self.tell_all(finished);
                Ok(())
            }
            Command::Alloc(range) => self.alloc(range),
            Command::Map => self.map(),
            Command::Truncate { size, preallocation } => self.truncate(size, preallocation.as_deref()),
            Command::Length => {
                let len = self.target()?.len();
                self.console.out(&format!("{}\n", size(len)));
                Ok(())
            }
            Command::Info => self.info(),
            Command::Sleep { milliseconds } => {
                std::thread::sleep(Duration::from_millis(milliseconds));
                let finished = self.background.finished();
                self.tell_all(finished);
                Ok(())
            }
            Command::Open(open) => self.open_command(open),
            Command::Close => self.close(),
            Command::Reopen(reopen) => self.reopen(reopen),
            Command::Abort => std::process::abort(),
            Command::Raise { signal } => self.raise(signal),
            Command::Help { command } => self.help(command.as_deref()),
            Command::Quit => Ok(()),
            Command::Break(command) => self.breakpoint(command),
            Command::Inject(text) => {
                self.console.out(&format!("{text}\n"));
                Ok(())
            }
            Command::Impossible(text) => {
                self.console.out(&format!("{text}\n"));
                Err(Failed)
            }
        }
    }

    fn target(&self) -> Result<Target, Failed> {
        self.file.as_ref().map(|(file, _)| file.target.clone()).ok_or(Failed)
    }

    /// Makes a request and tells how it went, and what else has finished meanwhile.
    fn foreground(&mut self, request: impl FnOnce(&Target) -> Outcome) -> Result<(), Failed> {
        let outcome = request(&self.target()?);
        let failed = outcome.failed;
        self.tell(outcome);
        let finished = self.background.finished();
        self.tell_all(finished);
        if failed { Err(Failed) } else { Ok(()) }
    }

    fn read(&mut self, request: Read) -> Result<(), Failed> {
        if request.manner != Manner::Background {
            return self.foreground(|target| target.read(&request));
        }
        let target = self.target()?;
        let finished = self.background.start(move || target.read(&request));
        self.tell_all(finished);
        Ok(())
    }

    fn write(&mut self, request: Write) -> Result<(), Failed> {
        if request.manner != Manner::Background {
            return self.foreground(|target| target.write(&request));
        }
        let target = self.target()?;
        let finished = self.background.start(move || target.write(&request));
        self.tell_all(finished);
        Ok(())
    }

    fn tell(&mut self, outcome: Outcome) {
        if let Some(complaint) = outcome.complaint {
            self.console.err(&complaint);
        }
        self.console.out(&outcome.text);
    }

    /// Tells of requests in the background; that they failed does not count.
    fn tell_all(&mut self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            self.tell(outcome);
        }
    }

    fn flush(&mut self) -> Result<(), Failed> {
        match self.target()?.disk.flush() {
            Ok(()) => Ok(()),
            Err(error) => {
                self.complain(&format!("flush failed: {}", super::target::reason(&error))).map(|_| ())
            }
        }
    }

    fn alloc(&mut self, range: Range) -> Result<(), Failed> {
        match self.target()?.allocated(range) {
            Ok((sum, len)) => {
                let offset = size(range.offset);
                self.console.out(&format!("{sum}/{len} bytes allocated at offset {offset}\n"));
                Ok(())
            }
            Err(reason) => {
                self.console.out(&format!("is_allocated failed: {reason}\n"));
                Err(Failed)
            }
        }
    }

    fn map(&mut self) -> Result<(), Failed> {
        let target = self.target()?;
        let console = &mut self.console;
        let result =
            target.map(&mut |range, allocated| console.out(&map_line(range.offset, range.len, allocated)));
        match result {
            Ok(()) => Ok(()),
            Err(reason) => {
                self.complain_named(&format!("Failed to query allocation status: {reason}")).map(|_| ())
            }
        }
    }

    fn truncate(&mut self, size: u64, preallocation: Option<&str>) -> Result<(), Failed> {
        match self.target()?.resize(size, preallocation) {
            Ok(()) => Ok(()),
            Err(text) => self.complain_named(&text).map(|_| ()),
        }
    }

    fn info(&mut self) -> Result<(), Failed> {
        let info = self.file.as_ref().map(|(file, _)| (file.info)()).ok_or(Failed)?;
        match info {
            Ok(text) => {
                self.console.out(&text);
                Ok(())
            }
            Err(text) => self.complain_named(&text).map(|_| ()),
        }
    }

    fn raise(&mut self, signal: i32) -> Result<(), Failed> {
        #[cfg(unix)]
        if signal > 0 {
            // A number that is no signal does nothing.
            let _ = signal_hook::low_level::raise(signal);
        }
        #[cfg(not(unix))]
        let _ = signal;
        Ok(())
    }

    fn help(&mut self, command: Option<&str>) -> Result<(), Failed> {
        match command {
            None => self.console.out(&help::all()),
            Some(name) => match find(name) {
                Some(spec) => self.console.out(&help::one(spec, name)),
                None => {
                    self.console.out(&format!("command {name} not found\n"));
                    return Err(Failed);
                }
            },
        }
        Ok(())
    }

    fn breakpoint(&mut self, command: Break) -> Result<(), Failed> {
        const NOT_FOUND: i32 = 2;
        const NOT_SUPPORTED: i32 = 95;
        let debugger = self.file.as_ref().and_then(|(file, _)| file.debugger.clone());
        let Some(debugger) = debugger else {
            return self.no_breakpoint(&command, NOT_SUPPORTED);
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
        self.tell_of_stops(&debugger);
        if done { Ok(()) } else { self.no_breakpoint(&command, NOT_FOUND) }
    }

    fn no_breakpoint(&mut self, command: &Break, code: i32) -> Result<(), Failed> {
        let why = os_error_text(code);
        let text = match command {
            Break::Set { .. } => format!("Could not set breakpoint: {why}"),
            Break::Remove { tag } => format!("Could not remove breakpoint {tag}: {why}"),
            Break::Resume { .. } => format!("Could not resume request: {why}"),
            Break::Wait { .. } => format!("Could not wait for a request: {why}"),
        };
        self.console.out(&format!("{text}\n"));
        Err(Failed)
    }

    fn tell_of_stops(&mut self, debugger: &Debugger) {
        for news in debugger.take_news() {
            self.console.out(&match news {
                StopNews::Stopped(tag) => format!("blkdebug: Suspended request '{tag}'\n"),
                StopNews::Resumed(tag) => format!("blkdebug: Resuming request '{tag}'\n"),
            });
        }
    }

    fn open_command(&mut self, open: Open) -> Result<(), Failed> {
        match request_of(open) {
            Ok(request) => self.open(request),
            Err(text) => self.complain_named(&text).map(|_| ()),
        }
    }

    /// Opens a disk; there must be none.
    pub(super) fn open_first(&mut self, request: OpenRequest) -> bool {
        self.open(request).is_ok()
    }

    fn open(&mut self, request: OpenRequest) -> Result<(), Failed> {
        self.open_as(request, false)
    }

    /// Opens a disk; `reopened`: one that was open a moment ago.
    fn open_as(&mut self, request: OpenRequest, reopened: bool) -> Result<(), Failed> {
        if self.file.is_some() {
            return self.complain_named("file open already, try 'help close'").map(|_| ());
        }
        match self.opener.open(&request) {
            Ok(file) => {
                for line in &file.warnings {
                    self.console.err(line);
                }
                self.file = Some((file, request));
                Ok(())
            }
            Err(lines) => {
                let device = request.path.as_ref().filter(|_| !request.image_opts);
                let what = match (reopened, device) {
                    (true, _) => String::new(),
                    (false, Some(path)) => format!("can't open device {path}: "),
                    (false, None) => "can't open: ".to_owned(),
                };
                let mut lines = lines.iter();
                let first = lines.next().map_or("", String::as_str);
                self.console.named(&format!("{what}{first}"));
                for line in lines {
                    self.console.err(line);
                }
                Err(Failed)
            }
        }
    }

    fn close(&mut self) -> Result<(), Failed> {
        let finished = self.background.wait();
        self.tell_all(finished);
        let Some((file, _)) = self.file.take() else {
            return Ok(());
        };
        let result = match file.target.disk.as_image().filter(|_| file.writable) {
            Some(image) => image.close(),
            None => Ok(()),
        };
        match result {
            Ok(()) => Ok(()),
            Err(error) => {
                let reason = super::target::reason(&error);
                self.complain_named(&format!("could not close the image cleanly: {reason}")).map(|_| ())
            }
        }
    }

    /// Closes the disk and opens it again in another way; in the old one, if that fails.
    fn reopen(&mut self, reopen: Reopen) -> Result<(), Failed> {
        let Some(old) = self.file.as_ref().map(|(_, request)| request.clone()) else {
            return Err(Failed);
        };
        let new = match changed(&old, reopen) {
            Ok(new) => new,
            Err(text) => return self.complain_named(&text).map(|_| ()),
        };
        self.close()?;
        self.open_as(new, true).map_err(|Failed| {
            let _ = self.open(old);
            Failed
        })
    }

    fn complain(&mut self, line: &str) -> Result<Flow, Failed> {
        self.console.err(line);
        Err(Failed)
    }

    fn complain_named(&mut self, text: &str) -> Result<Flow, Failed> {
        self.console.named(text);
        Err(Failed)
    }
}
