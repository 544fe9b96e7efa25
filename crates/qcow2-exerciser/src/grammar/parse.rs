//! Turns words into a command: which options a command takes, and which exclude each other. Pure.

use super::command::{
    Break, Check, Command, Content, Manner, Open, Place, Range, Read, Reopen, Style, Write,
};
use super::line::{Arguments, MAX_REQUEST, c_integer, number, pattern, request_len, request_lens};
use super::table::Spec;

/// Why a line is not a command, and where the text goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Complaint {
    /// To standard output.
    Out(String),
    /// To standard error, after the program's name.
    Named(String),
    /// The usage line on standard output; getopt's text, if any, on standard error before it.
    Usage(Option<String>),
}

impl From<String> for Complaint {
    fn from(text: String) -> Self {
        Self::Out(text)
    }
}

type Parsed = Result<Command, Complaint>;

/// Parses the words after the name of `spec`. The caller has checked their number (`Spec::check_count`).
pub(crate) fn parse(spec: &Spec, words: &[&str]) -> Parsed {
    let Some(letters) = spec.letters else {
        return without_options(spec.name, words);
    };
    let (arguments, error) = Arguments::parse(letters, words);
    if let Some(injection) = injection(spec.name, &arguments)? {
        return Ok(Command::Inject(injection));
    }
    if let Some(text) = error {
        return Err(Complaint::Usage(Some(format!("{}: {text}", spec.name))));
    }
    match spec.name {
        "read" => read(&arguments),
        "readv" => readv(&arguments, Manner::Vectored),
        "aio_read" => readv(&arguments, Manner::Background),
        "write" => write(&arguments),
        "writev" => writev(&arguments),
        "aio_write" => aio_write(&arguments),
        "discard" => discard(&arguments),
        "truncate" => truncate(&arguments),
        "open" => open(&arguments),
        "reopen" => reopen(&arguments),
        _ => without_options(spec.name, &arguments.operands),
    }
}

/// What `aio_read -i` and `aio_write -i` print. Like qemu-io, options are read from left to right and `-i`
/// ends the command at once: an invalid `-P` before it is an error, anything after it is ignored.
fn injection(name: &str, arguments: &Arguments<'_>) -> Result<Option<&'static str>, Complaint> {
    let text = match name {
        "aio_read" => "injecting invalid read request",
        "aio_write" => "injecting invalid write request",
        _ => return Ok(None),
    };
    for (letter, value) in &arguments.options {
        match letter {
            'i' => return Ok(Some(text)),
            'P' => drop(pattern(value)?),
            _ => {}
        }
    }
    Ok(None)
}

fn without_options(name: &str, words: &[&str]) -> Parsed {
    let text = |at: usize| words.get(at).copied().unwrap_or_default();
    Ok(match name {
        "flush" => Command::Flush,
        "aio_flush" => Command::AioFlush,
        "alloc" => {
            let len = words.get(1).map_or(Ok(512), |text| number(text));
            Command::Alloc(Range { offset: number(text(0))?, len: len? })
        }
        "map" => Command::Map,
        "length" => Command::Length,
        "info" => Command::Info,
        "sleep" => sleep(text(0))?,
        "close" => Command::Close,
        "abort" => Command::Abort,
        "sigraise" => raise(text(0))?,
        "help" => Command::Help { command: words.first().map(|&word| word.to_owned()) },
        "quit" => Command::Quit,
        "break" => Command::Break(Break::Set { event: text(0).to_owned(), tag: text(1).to_owned() }),
        "remove_break" => Command::Break(Break::Remove { tag: text(0).to_owned() }),
        "resume" => Command::Break(Break::Resume { tag: text(0).to_owned() }),
        "wait_break" => Command::Break(Break::Wait { tag: text(0).to_owned() }),
        zone => {
            number(text(0))?;
            number(text(1))?;
            Command::Impossible(format!("{} failed: {NOT_SUPPORTED}", zone.replace('_', " ")))
        }
    })
}

const NOT_SUPPORTED: &str = "Operation not supported";

fn style(arguments: &Arguments<'_>) -> Style {
    Style { quiet: arguments.has('q'), csv: arguments.has('C') }
}

/// Checks every `-P`; the last one counts.
fn pattern_option(arguments: &Arguments<'_>) -> Result<Option<u8>, Complaint> {
    let mut byte = None;
    for (_, text) in arguments.options.iter().filter(|(letter, _)| *letter == 'P') {
        byte = Some(pattern(text)?);
    }
    Ok(byte)
}

fn read(arguments: &Arguments<'_>) -> Parsed {
    let size_option = |letter| arguments.last(letter).map(number).transpose();
    let (skip, checked_len) = (size_option('s')?, size_option('l')?);
    let byte = pattern_option(arguments)?;
    let [offset, len] = arguments.operands[..] else {
        return Err(Complaint::Usage(None));
    };
    let range = Range { offset: number(offset)?, len: request_len(len)? };
    let check = match byte {
        None if skip.is_some() || checked_len.is_some() => return Err(Complaint::Usage(None)),
        None => None,
        Some(byte) => {
            let skip = skip.unwrap_or(0);
            let rest = range.len.checked_sub(skip);
            let len = checked_len.or(rest).filter(|len| rest.is_some_and(|rest| *len <= rest));
            let outside = || "pattern verification range exceeds end of read data".to_owned();
            Some(Check { byte, skip, len: len.ok_or_else(outside)? })
        }
    };
    let vm_state = arguments.has('b');
    if vm_state {
        whole_sectors(range)?;
        if arguments.has('r') {
            return Err(complain("I/O buffer registration is not supported when reading from vmstate"));
        }
    }
    let style = style(arguments);
    Ok(Command::Read(Read { range, manner: Manner::Plain, style, dump: arguments.has('v'), check, vm_state }))
}

/// Range of a request with several buffers: an offset and one or more lengths.
fn vector_range(arguments: &Arguments<'_>) -> Result<Range, Complaint> {
    match &arguments.operands[..] {
        [offset, lens @ ..] if !lens.is_empty() => {
            Ok(Range { offset: number(offset)?, len: request_lens(lens)?.iter().sum() })
        }
        _ => Err(Complaint::Usage(None)),
    }
}

fn readv(arguments: &Arguments<'_>, manner: Manner) -> Parsed {
    let byte = pattern_option(arguments)?;
    let range = vector_range(arguments)?;
    let check = byte.map(|byte| Check { byte, skip: 0, len: range.len });
    let style = style(arguments);
    Ok(Command::Read(Read { range, manner, style, dump: arguments.has('v'), check, vm_state: false }))
}

fn write(arguments: &Arguments<'_>) -> Parsed {
    let has = |letter| arguments.has(letter);
    let byte = pattern_option(arguments)?;
    let [offset, len] = arguments.operands[..] else {
        return Err(Complaint::Usage(None));
    };
    if has('b') && has('z') {
        return Err(complain("-b and -z cannot be specified at the same time"));
    }
    if has('f') && (has('b') || has('c')) {
        return Err(complain("-f and -b or -c cannot be specified at the same time"));
    }
    for letter in ['n', 'u'] {
        if has(letter) && !has('z') {
            return Err(complain(&format!("-{letter} requires -z to be specified")));
        }
    }
    if [has('z'), byte.is_some(), has('s')].iter().filter(|given| **given).count() > 1 {
        return Err(complain("Only one of -z, -P, and -s can be specified at the same time"));
    }
    let offset = number(offset)?;
    let only_fast = has('n');
    let len = match number(len)? {
        count if count > MAX_REQUEST && !only_fast => {
            return Err(complain(&format!("length cannot exceed {MAX_REQUEST} without -n, given {len}")));
        }
        count => count,
    };
    let range = Range { offset, len };
    let place = match (has('b'), has('c')) {
        (true, _) => Place::VmState,
        (false, true) => Place::Compressed,
        (false, false) => Place::Disk,
    };
    if place != Place::Disk {
        whole_sectors(range)?;
    }
    if has('z') && has('r') {
        return Err(complain(ZEROES_IN_BUFFER));
    }
    let content = match (has('z'), arguments.last('s')) {
        (true, _) => Content::Zeroes { may_unmap: has('u'), only_fast },
        (false, Some(file)) => Content::File(file.to_owned()),
        (false, None) => Content::Byte(byte.unwrap_or(DEFAULT_BYTE)),
    };
    let style = style(arguments);
    let write = Write { range, manner: Manner::Plain, style, content, durable: has('f'), place };
    Ok(Command::Write(write))
}

/// Zero writes have no buffer that could be registered.
const ZEROES_IN_BUFFER: &str = "cannot combine zero write with registered I/O buffer";

/// The byte that writes use without `-P`.
const DEFAULT_BYTE: u8 = 0xcd;

fn writev(arguments: &Arguments<'_>) -> Parsed {
    let byte = pattern_option(arguments)?;
    let range = vector_range(arguments)?;
    let content = Content::Byte(byte.unwrap_or(DEFAULT_BYTE));
    Ok(background_or_vectored(arguments, range, Manner::Vectored, content))
}

fn aio_write(arguments: &Arguments<'_>) -> Parsed {
    let byte = pattern_option(arguments)?;
    let zeroes = arguments.has('z');
    let [offset, lens @ ..] = &arguments.operands[..] else {
        return Err(Complaint::Usage(None));
    };
    if lens.is_empty() {
        return Err(Complaint::Usage(None));
    }
    if zeroes && lens.len() != 1 {
        return Err(complain("-z supports only a single length parameter"));
    }
    if arguments.has('u') && !zeroes {
        return Err(complain("-u requires -z to be specified"));
    }
    if arguments.has('r') && zeroes {
        return Err(complain(ZEROES_IN_BUFFER));
    }
    let offset = number(offset)?;
    let (len, content) = match zeroes {
        true => (number(lens[0])?, Content::Zeroes { may_unmap: arguments.has('u'), only_fast: false }),
        false => (request_lens(lens)?.iter().sum(), Content::Byte(byte.unwrap_or(DEFAULT_BYTE))),
    };
    Ok(background_or_vectored(arguments, Range { offset, len }, Manner::Background, content))
}

fn background_or_vectored(
    arguments: &Arguments<'_>,
    range: Range,
    manner: Manner,
    content: Content,
) -> Command {
    let (style, durable) = (style(arguments), arguments.has('f'));
    Command::Write(Write { range, manner, style, content, durable, place: Place::Disk })
}

fn discard(arguments: &Arguments<'_>) -> Parsed {
    let [offset, len] = arguments.operands[..] else {
        return Err(Complaint::Usage(None));
    };
    let range = Range { offset: number(offset)?, len: request_len(len)? };
    Ok(Command::Discard { range, style: style(arguments) })
}

fn truncate(arguments: &Arguments<'_>) -> Parsed {
    for (_, mode) in &arguments.options {
        if !PREALLOCATION_MODES.contains(mode) {
            return Err(Complaint::Named(format!("Invalid preallocation mode '{mode}'")));
        }
    }
    let size = arguments.operands.first().copied();
    let preallocation = arguments.last('m').filter(|mode| *mode != "off").map(str::to_owned);
    // The complaint names the first argument, which options are moved to; a missing size is a wrong one.
    let first = if arguments.options.is_empty() { size.unwrap_or("--") } else { "-m" };
    let size = size.unwrap_or_default();
    let size = number(size).map_err(|text| text.replace(&format!("-- {size}"), &format!("-- {first}")))?;
    Ok(Command::Truncate { size, preallocation })
}

const PREALLOCATION_MODES: [&str; 4] = ["off", "metadata", "falloc", "full"];

fn open(arguments: &Arguments<'_>) -> Parsed {
    let text = |letter| arguments.last(letter).map(str::to_owned);
    if arguments.operands.len() > 1 {
        return Err(Complaint::Usage(None));
    }
    Ok(Command::Open(Open {
        path: arguments.operands.first().map(|&path| path.to_owned()),
        read_only: arguments.has('r'),
        snapshot: arguments.has('s'),
        copy_on_read: arguments.has('C'),
        no_cache: arguments.has('n'),
        native_aio: arguments.has('k'),
        force_share: arguments.has('U'),
        cache: text('t'),
        discard: text('d'),
        aio: text('i'),
        options: all(arguments, 'o'),
    }))
}

fn reopen(arguments: &Arguments<'_>) -> Parsed {
    if arguments.count('r') + arguments.count('w') > 1 {
        return Err(Complaint::Named("Only one -r/-w option may be given".to_owned()));
    }
    if !arguments.operands.is_empty() {
        return Err(Complaint::Usage(None));
    }
    let read_only = match (arguments.has('r'), arguments.has('w')) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    };
    let cache = arguments.last('c').map(str::to_owned);
    Ok(Command::Reopen(Reopen { read_only, cache, options: all(arguments, 'o') }))
}

fn all(arguments: &Arguments<'_>, letter: char) -> Vec<String> {
    let given = arguments.options.iter().filter(|(given, _)| *given == letter);
    given.map(|(_, value)| (*value).to_owned()).collect()
}

fn sleep(text: &str) -> Parsed {
    let milliseconds = c_integer(text).and_then(|value| u64::try_from(value).ok());
    match milliseconds {
        Some(milliseconds) => Ok(Command::Sleep { milliseconds }),
        None => Err(complain(&format!("{text} is not a valid number"))),
    }
}

/// The largest signal number that is accepted.
const MAX_SIGNAL: u64 = 65;

fn raise(text: &str) -> Parsed {
    match number(text)? {
        signal if signal <= MAX_SIGNAL => Ok(Command::Raise { signal: signal as i32 }),
        _ => Err(complain(&format!("signal argument '{text}' is too large to be a valid signal"))),
    }
}

fn complain(text: &str) -> Complaint {
    Complaint::Out(text.to_owned())
}

/// Compressed data and VM state are addressed in whole sectors.
fn whole_sectors(range: Range) -> Result<(), Complaint> {
    for (value, what) in [(range.offset, "offset"), (range.len, "count")] {
        if value % 512 != 0 {
            return Err(complain(&format!("{value} is not a sector-aligned value for '{what}'")));
        }
    }
    Ok(())
}
