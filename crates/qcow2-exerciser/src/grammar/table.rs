//! The commands: names, numbers of words, options, and what the help says.

/// One command.
#[derive(Debug)]
pub(crate) struct Spec {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its short name.
    pub(crate) alias: Option<&'static str>,
    /// How many words must follow, options included.
    pub(crate) min_words: usize,
    /// How many may; `None`: any number.
    pub(crate) max_words: Option<usize>,
    /// The letters of its options, as for getopt; `None`: words are taken as they are.
    pub(crate) letters: Option<&'static str>,
    /// What follows the name, for the help; `None`: nothing.
    pub(crate) synopsis: Option<&'static str>,
    /// What it does.
    pub(crate) summary: &'static str,
    /// Whether a disk must be open.
    pub(crate) needs_file: bool,
    /// Whether it changes the disk.
    pub(crate) writes: bool,
}

impl Spec {
    /// Complains about a wrong number of words, as standard error has it.
    pub(crate) fn check_count(&self, typed: &str, count: usize) -> Result<(), String> {
        let expected = match (self.min_words, self.max_words) {
            (min, None) if count < min => format!("at least {min}"),
            (min, Some(max)) if min == max && count != min => format!("{min}"),
            (min, Some(max)) if !(min..=max).contains(&count) => format!("between {min} and {max}"),
            _ => return Ok(()),
        };
        Err(format!("bad argument count {count} to {typed}, expected {expected} arguments"))
    }

    /// The usage line, for the command as it was typed.
    pub(crate) fn usage(&self, typed: &str) -> String {
        match self.synopsis {
            Some(synopsis) => format!("{typed} {synopsis} -- {}\n", self.summary),
            None => format!("{typed} -- {}\n", self.summary),
        }
    }
}

/// The command called `name`.
pub(crate) fn find(name: &str) -> Option<&'static Spec> {
    COMMANDS.iter().find(|spec| spec.name == name || spec.alias == Some(name))
}

/// A command without options that needs an open disk.
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
    Spec { needs_file: false, ..plain("abort", 0, "end the program as a crash would") },
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
        ..plain("alloc", 1, "count the bytes of a range that the top layer has")
    },
    Spec { synopsis: Some("event tag"), ..plain("break", 2, "stop a request at a debug event") },
    Spec { alias: Some("c"), ..plain("close", 0, "close the disk") },
    Spec {
        alias: Some("d"),
        writes: true,
        ..with_options("discard", "Cq", "[-Cq] off len", "say that a range is no longer needed")
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
    Spec { synopsis: Some(""), ..plain("map", 0, "list what the top layer has") },
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
            "read, and perhaps check or show",
        )
    },
    with_options(
        "readv",
        "CP:qrv",
        "[-Cqrv] [-P pattern] off len [len..]",
        "read into several buffers at once",
    ),
    Spec { synopsis: Some("tag"), ..plain("remove_break", 1, "remove a debug stop") },
    Spec {
        min_words: 0,
        ..with_options(
            "reopen",
            "c:o:rw",
            "[(-r|-w)] [-c cache] [-o options]",
            "close the disk and open it in another way",
        )
    },
    Spec { synopsis: Some("tag"), ..plain("resume", 1, "go on with a stopped request") },
    Spec { synopsis: Some("signal"), needs_file: false, ..plain("sigraise", 1, "send the program a signal") },
    Spec { needs_file: false, ..plain("sleep", 1, "wait for so many milliseconds") },
    Spec {
        alias: Some("t"),
        min_words: 1,
        max_words: Some(3),
        writes: true,
        ..with_options("truncate", "m:", "[-m prealloc_mode] off", "change the size of the disk")
    },
    Spec { synopsis: Some("tag"), ..plain("wait_break", 1, "wait until a request is stopped") },
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
        max_words: Some(4),
        synopsis: Some("offset len [len..]"),
        ..plain("zone_append", 3, "append to a zone of a zoned device")
    },
    Spec { synopsis: Some("offset len"), ..plain("zone_close", 2, "close zones of a zoned device") },
    Spec { synopsis: Some("offset len"), ..plain("zone_finish", 2, "fill zones of a zoned device") },
    Spec { synopsis: Some("offset len"), ..plain("zone_open", 2, "open zones of a zoned device") },
    Spec { synopsis: Some("offset number"), ..plain("zone_report", 2, "describe zones of a zoned device") },
    Spec { synopsis: Some("offset len"), ..plain("zone_reset", 2, "reset zones of a zoned device") },
];
