//! Table of the commands: names, number of words, options, help.

/// Description of one command.
#[derive(Debug)]
pub(crate) struct Spec {
    /// Name.
    pub(crate) name: &'static str,
    /// Short name.
    pub(crate) alias: Option<&'static str>,
    /// Minimum number of words after the name, options included.
    pub(crate) min_words: usize,
    /// Maximum number; `None`: no limit.
    pub(crate) max_words: Option<usize>,
    /// Option letters, in `getopt`'s form; `None`: the command takes no options.
    pub(crate) letters: Option<&'static str>,
    /// Arguments as shown in the help; `None`: no arguments.
    pub(crate) synopsis: Option<&'static str>,
    /// One-line description for the help.
    pub(crate) summary: &'static str,
    /// True if a disk must be open.
    pub(crate) needs_file: bool,
    /// True if the command changes the disk.
    pub(crate) writes: bool,
}

impl Spec {
    /// Checks the number of words. Errors: the line for standard error.
    pub(crate) fn check_count(&self, typed: &str, count: usize) -> Result<(), String> {
        let expected = match (self.min_words, self.max_words) {
            (min, None) if count < min => format!("at least {min}"),
            (min, Some(max)) if min == max && count != min => format!("{min}"),
            (min, Some(max)) if !(min..=max).contains(&count) => format!("between {min} and {max}"),
            _ => return Ok(()),
        };
        Err(format!("bad argument count {count} to {typed}, expected {expected} arguments"))
    }

    /// The usage line; `typed` is the name that the user typed.
    pub(crate) fn usage(&self, typed: &str) -> String {
        match self.synopsis {
            Some(synopsis) => format!("{typed} {synopsis} -- {}\n", self.summary),
            None => format!("{typed} -- {}\n", self.summary),
        }
    }
}

/// Finds a command by its name or short name.
pub(crate) fn find(name: &str) -> Option<&'static Spec> {
    COMMANDS.iter().find(|spec| spec.name == name || spec.alias == Some(name))
}

/// A command without options that needs an open disk and takes exactly `words` words.
const fn plain(name: &'static str, words: usize, summary: &'static str) -> Spec {
    Spec {
        name,
        alias: None,
        min_words: words,
        max_words: Some(words),
        letters: None,
        synopsis: None,
        summary,
        needs_file: true,
        writes: false,
    }
}

/// A command with options and any number of words.
const fn with_options(
    name: &'static str,
    letters: &'static str,
    synopsis: &'static str,
    summary: &'static str,
) -> Spec {
    Spec {
        min_words: 2,
        max_words: None,
        letters: Some(letters),
        synopsis: Some(synopsis),
        ..plain(name, 0, summary)
    }
}

/// All commands, sorted by name.
pub(crate) static COMMANDS: &[Spec] = &[
    Spec { needs_file: false, ..plain("abort", 0, "abort the program, as if it had crashed") },
    plain("aio_flush", 0, "wait for all background requests"),
    with_options("aio_read", "CiP:qrv", "[-Ciqrv] [-P pattern] off len [len..]", "read in the background"),
    Spec {
        writes: true,
        ..with_options(
            "aio_write",
            "CfiP:qruz",
            "[-Cfiqruz] [-P pattern] off len [len..]",
            "write in the background",
        )
    },
    Spec {
        alias: Some("a"),
        max_words: Some(2),
        synopsis: Some("offset [count]"),
        ..plain("alloc", 1, "count the bytes of a range that are allocated in the top layer")
    },
    Spec { synopsis: Some("event tag"), ..plain("break", 2, "suspend a request at a debug event") },
    Spec { alias: Some("c"), ..plain("close", 0, "close the disk") },
    Spec {
        alias: Some("d"),
        writes: true,
        ..with_options("discard", "Cq", "[-Cq] off len", "discard a range")
    },
    Spec { alias: Some("f"), ..plain("flush", 0, "make all writes durable") },
    Spec {
        alias: Some("?"),
        max_words: Some(1),
        synopsis: Some("[command]"),
        needs_file: false,
        ..plain("help", 0, "describe one or all commands")
    },
    Spec { alias: Some("i"), ..plain("info", 0, "describe the disk") },
    Spec { alias: Some("l"), ..plain("length", 0, "show the size of the disk") },
    Spec { synopsis: Some(""), ..plain("map", 0, "list the allocated ranges of the top layer") },
    Spec {
        alias: Some("o"),
        min_words: 1,
        needs_file: false,
        ..with_options(
            "open",
            "snCro:ki:t:d:U",
            "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
            "open a disk",
        )
    },
    Spec { alias: Some("q"), max_words: None, needs_file: false, ..plain("quit", 0, "end the program") },
    Spec {
        alias: Some("r"),
        ..with_options(
            "read",
            "bCl:pP:qrs:v",
            "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
            "read, and optionally verify or print the data",
        )
    },
    with_options(
        "readv",
        "CP:qrv",
        "[-Cqrv] [-P pattern] off len [len..]",
        "read into several buffers at once",
    ),
    Spec { synopsis: Some("tag"), ..plain("remove_break", 1, "remove a breakpoint") },
    Spec {
        min_words: 0,
        ..with_options(
            "reopen",
            "c:o:rw",
            "[(-r|-w)] [-c cache] [-o options]",
            "reopen the disk with other options",
        )
    },
    Spec { synopsis: Some("tag"), ..plain("resume", 1, "resume a suspended request") },
    Spec { synopsis: Some("signal"), needs_file: false, ..plain("sigraise", 1, "send the program a signal") },
    Spec { needs_file: false, ..plain("sleep", 1, "wait for a number of milliseconds") },
    Spec {
        alias: Some("t"),
        min_words: 1,
        max_words: Some(3),
        writes: true,
        ..with_options("truncate", "m:", "[-m prealloc_mode] off", "change the size of the disk")
    },
    Spec { synopsis: Some("tag"), ..plain("wait_break", 1, "wait until a request is suspended") },
    Spec {
        alias: Some("w"),
        writes: true,
        ..with_options(
            "write",
            "bcCfnpP:qrs:uz",
            "[-bcCfnqruz] [-P pattern | -s source_file] off len",
            "write a pattern, a file's content or zeroes",
        )
    },
    Spec {
        writes: true,
        ..with_options(
            "writev",
            "CfP:qr",
            "[-Cfqr] [-P pattern] off len [len..]",
            "write from several buffers at once",
        )
    },
    Spec {
        alias: Some("zap"),
        max_words: Some(4),
        synopsis: Some("offset len [len..]"),
        ..plain("zone_append", 3, "append to a zone of a zoned device")
    },
    Spec {
        alias: Some("zc"),
        synopsis: Some("offset len"),
        ..plain("zone_close", 2, "close zones of a zoned device")
    },
    Spec {
        alias: Some("zf"),
        synopsis: Some("offset len"),
        ..plain("zone_finish", 2, "fill zones of a zoned device")
    },
    Spec {
        alias: Some("zo"),
        synopsis: Some("offset len"),
        ..plain("zone_open", 2, "open zones of a zoned device")
    },
    Spec {
        alias: Some("zrp"),
        synopsis: Some("offset number"),
        ..plain("zone_report", 2, "describe zones of a zoned device")
    },
    Spec {
        alias: Some("zrs"),
        synopsis: Some("offset len"),
        ..plain("zone_reset", 2, "reset zones of a zoned device")
    },
];
