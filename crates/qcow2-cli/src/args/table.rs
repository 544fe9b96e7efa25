//! Every verb and every option, in one place.

use super::spec::{
    BACKING, BACKING_FORMAT, CACHE, FILENAME, FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, JSON_PROGRESS, OBJECT,
    OPTIONS, OUTPUT, PROGRESS, QUIET, WRITE_CACHE, advertised, option, own, own_value, short,
};
use super::tools::{IO, SERVE};
use super::{Opt, OptionSpec, Verb};
use crate::command;
use qcow2_getopt::nearest;

/// The verbs, in the order of the help.
pub(crate) static VERBS: &[Verb] = &[
    Verb {
        name: "amend",
        summary: "Change what an image is: its version, its features, its size",
        synopsis: "[-f FMT | --image-opts] [-t CACHE] [--force] [-p] [-q] -o OPTIONS FILENAME",
        options: &[
            HELP,
            OBJECT,
            OPTIONS,
            QUIET,
            PROGRESS,
            FORMAT,
            IMAGE_OPTS,
            WRITE_CACHE,
            option(Opt::Force, None, "force", None, "allow changes that can make the data unrecoverable"),
        ],
        operands: &[FILENAME],
        run: command::amend::run,
    },
    Verb {
        name: "bench",
        summary: "Send requests to an image and measure how long they take",
        synopsis: "[-f FMT | --image-opts] [-c COUNT] [-d DEPTH] [-s SIZE] [-S STEP] [-o OFFSET] [-w] [...] FILENAME",
        options: BENCH,
        operands: &[FILENAME],
        run: command::bench::run,
    },
    Verb {
        name: "bitmap",
        summary: "Change the bitmaps that record what was written to an image",
        synopsis: "(--add | --remove | --clear | --enable | --disable | --merge SOURCE)... [-g SIZE] [-b FILE [-F FMT]] [-f FMT | --image-opts] FILENAME BITMAP",
        options: BITMAP,
        operands: &[FILENAME, ("BITMAP", "the name of the bitmap")],
        run: command::bitmap::run,
    },
    Verb {
        name: "check",
        summary: "Check the references and refcounts of an image",
        synopsis: "[-f FMT | --image-opts] [-T CACHE] [-U] [--output human|json] [-r leaks|all [--dry-run]] FILENAME",
        options: &[
            HELP,
            QUIET,
            FORMAT,
            CACHE,
            option(Opt::Repair, Some('r'), "repair", Some("leaks|all"), "what to repair"),
            own(Opt::DryRun, "dry-run", "with -r: show what would change, and write nothing"),
            OUTPUT,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
        ],
        operands: &[FILENAME],
        run: command::check::run,
    },
    Verb {
        name: "checksum",
        summary: "Digest what a machine sees: the same for every image of the same disk",
        synopsis: "[-f FMT | --image-opts] [-T CACHE] [-U] [-p] [--json] [--blake3] [--output human|json] FILENAME...",
        options: &[
            HELP,
            FORMAT,
            CACHE,
            OUTPUT,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
            PROGRESS,
            JSON_PROGRESS,
            option(Opt::Blake3, None, "blake3", None, "BLAKE3 instead of CRC-32"),
        ],
        operands: &[FILENAME],
        run: command::checksum::run,
    },
    Verb {
        name: "commit",
        summary: "Write what an image holds into its backing file",
        synopsis: "[-f FMT | --image-opts] [-t CACHE] [-b BASE] [-d] [-r RATE] [-p] [-q] FILENAME",
        options: &[
            HELP,
            QUIET,
            PROGRESS,
            FORMAT,
            IMAGE_OPTS,
            WRITE_CACHE,
            option(Opt::Drop, Some('d'), "drop", None, "leave FILENAME as it is instead of emptying it"),
            option(
                Opt::Backing,
                Some('b'),
                "base",
                Some("BASE"),
                "the backing file to write to (the next one)",
            ),
            option(Opt::Rate, Some('r'), "rate", Some("RATE"), "bytes a second at most"),
            OBJECT,
        ],
        operands: &[FILENAME],
        run: command::commit::run,
    },
    Verb {
        name: "compare",
        summary: "Compare the content of two images",
        synopsis: "[-f FMT] [-F FMT] [--image-opts] [-T CACHE] [-s] [-p] [-q] [-U] FILENAME1 FILENAME2",
        options: &[
            HELP,
            QUIET,
            OBJECT,
            CACHE,
            IMAGE_OPTS,
            option(Opt::Format, Some('f'), "a-format", Some("FMT"), "format of FILENAME1"),
            option(Opt::Format, None, "left-format", Some("FMT"), ""),
            option(Opt::FormatOfSecond, Some('F'), "b-format", Some("FMT"), "format of FILENAME2"),
            option(Opt::FormatOfSecond, None, "right-format", Some("FMT"), ""),
            FORCE_SHARE,
            option(Opt::Strict, Some('s'), "strict", None, "sizes and allocation must be equal too"),
            PROGRESS,
            JSON_PROGRESS,
        ],
        operands: &[("FILENAME1", "an image"), ("FILENAME2", "the image to compare it with")],
        run: command::compare::run,
    },
    Verb {
        name: "convert",
        summary: "Copy images into a new image, of the same or another format",
        synopsis: "[-f FMT] [-O FMT] [-o OPTIONS] [-c] [-B FILE -F FMT] [-n] [...] SOURCE [SOURCE...] TARGET",
        options: CONVERT,
        operands: &[
            ("SOURCE", "image to copy, or - for standard input; several are put one after the other"),
            ("TARGET", "image to make, or - for standard output"),
        ],
        run: command::convert::run,
    },
    Verb {
        name: "create",
        summary: "Make a new image",
        synopsis: "[-f FMT] [-o OPTIONS] [-b FILE -F FMT] [-u] [-q] FILENAME [SIZE]",
        options: &[
            HELP,
            QUIET,
            OBJECT,
            option(Opt::Format, Some('f'), "format", Some("FMT"), "format of the new image (raw)"),
            BACKING,
            BACKING_FORMAT,
            option(Opt::BackingUnsafe, Some('u'), "backing-unsafe", None, "do not open the backing file"),
            OPTIONS,
        ],
        operands: &[
            ("FILENAME", "image to make; an existing file is overwritten"),
            ("SIZE", "bytes, or with b k M G T P E; not needed beside a backing file"),
        ],
        run: command::create::run,
    },
    Verb {
        name: "ctl",
        summary: "Change disks that 'serve --control' serves, while they are used, and show their statistics",
        synopsis: "SOCKET COMMAND [NAME=VALUE]...\n\nCommands:\n  query | statistics | metrics | top [TIMES]\n  snapshot file=NEW             the disk goes on in the new overlay NEW\n  commit [depth=N]              merge the layer below N others into the one below it (0: the top)\n  backup file=TARGET [format=FMT] [bitmap=NAME [clear=on]]\n                                copy the disk, or what a bitmap marks over an earlier backup\n  resize size=SIZE\n  snapshot-save name=NAME | snapshot-delete name=NAME | snapshot-list\n  bitmap-add bitmap=NAME [granularity=SIZE] | bitmap-remove | bitmap-clear | bitmap-enable\n  bitmap-disable | bitmap-merge bitmap=NAME source=NAME | bitmap-list\nWith several disks, disk=NAME says which export is meant.",
        options: &[HELP],
        operands: &[("SOCKET", "the path given to 'serve --control'"), ("COMMAND", "what to do")],
        run: command::ctl::run,
    },
    Verb {
        name: "dd",
        summary: "Copy a part of an image into a new image",
        synopsis: "[-f FMT | --image-opts] [-O FMT] [-U] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
        options: &[
            HELP,
            FORMAT,
            IMAGE_OPTS,
            option(Opt::TargetFormat, Some('O'), "output-format", Some("FMT"), "format of OUTPUT (raw)"),
            FORCE_SHARE,
            OBJECT,
        ],
        operands: &[
            ("bs=SIZE", "bytes of a block (512)"),
            ("count=BLOCKS", "the part ends after so many blocks of INPUT"),
            ("skip=BLOCKS", "the part begins after so many blocks of INPUT"),
            ("if=INPUT", "the image to read"),
            ("of=OUTPUT", "the image to make"),
        ],
        run: command::dd::run,
    },
    Verb {
        name: "info",
        summary: "Show what an image says of itself",
        synopsis: "[-f FMT | --image-opts] [-b] [-U] [--output human|json] FILENAME...",
        options: &[
            HELP,
            FORMAT,
            OUTPUT,
            option(Opt::BackingChain, Some('b'), "backing-chain", None, "show the backing files too"),
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
        ],
        operands: &[FILENAME],
        run: command::info::run,
    },
    Verb {
        name: "io",
        summary: "Read, write and look at a disk by commands, as qemu-io does",
        synopsis: "[-c COMMAND]... [-f FMT | --image-opts] [-r] [-s] [-n | -t CACHE] [...] [FILENAME]",
        options: IO,
        operands: &[FILENAME],
        run: command::io::run,
    },
    Verb {
        name: "map",
        summary: "Show where the content of an image is stored",
        synopsis: "[-f FMT | --image-opts] [-s OFFSET] [-l LENGTH] [-U] [--output human|json] FILENAME",
        options: &[
            HELP,
            FORMAT,
            OUTPUT,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
            option(Opt::StartOffset, Some('s'), "start-offset", Some("OFFSET"), "first byte to show"),
            option(Opt::MaxLength, Some('l'), "max-length", Some("LENGTH"), "how many bytes to show"),
        ],
        operands: &[FILENAME],
        run: command::map::run,
    },
    Verb {
        name: "measure",
        summary: "Tell how large the file of a new image would be",
        synopsis: "[-f FMT | --image-opts] [-O FMT] [-o OPTIONS] [-l SNAPSHOT] [--output human|json] (--size SIZE | FILENAME)",
        options: &[
            HELP,
            option(
                Opt::TargetFormat,
                Some('O'),
                "target-format",
                Some("FMT"),
                "format of the new image (raw)",
            ),
            option(Opt::Format, Some('f'), "format", Some("FMT"), "format of FILENAME"),
            option(Opt::Options, Some('o'), "options", Some("OPTIONS"), "key=value,... of the new image"),
            option(Opt::Snapshot, Some('l'), "snapshot", Some("SNAPSHOT"), "read this snapshot of FILENAME"),
            OBJECT,
            IMAGE_OPTS,
            OUTPUT,
            option(Opt::Size, None, "size", Some("SIZE"), "an empty disk of SIZE bytes"),
            FORCE_SHARE,
        ],
        operands: &[("FILENAME", "what the new image would hold")],
        run: command::measure::run,
    },
    Verb {
        name: "rebase",
        summary: "Give an image another backing file",
        synopsis: "[-f FMT | --image-opts] [-b FILE [-F FMT]] [-u] [-c] [-t CACHE] [-T CACHE] [-p] [-q] [-U] FILENAME",
        options: &[
            HELP,
            QUIET,
            PROGRESS,
            FORMAT,
            IMAGE_OPTS,
            option(Opt::Cache, Some('t'), "cache", Some("CACHE"), "cache mode of FILENAME (writeback)"),
            option(Opt::Backing, Some('b'), "backing", Some("FILE"), "the new backing file; \"\" for none"),
            BACKING_FORMAT,
            option(
                Opt::BackingCache,
                Some('T'),
                "backing-cache",
                Some("CACHE"),
                "cache mode of the new backing file (writeback)",
            ),
            option(Opt::BackingUnsafe, Some('u'), "backing-unsafe", None, "change the name only"),
            option(Opt::Compress, Some('c'), "compress", None, "compress what is copied"),
            FORCE_SHARE,
            OBJECT,
        ],
        operands: &[FILENAME],
        run: command::rebase::run,
    },
    Verb {
        name: "rescue",
        summary: "Read what is left of a damaged image; exits with 3 if something was lost or guessed",
        synopsis: "[-O FMT] [--cluster-size SIZE] [--size SIZE] [--backing FILE [-F FMT]] [-p] [...] FILENAME TARGET",
        options: RESCUE,
        operands: &[FILENAME, ("TARGET", "image to make; an existing file is overwritten")],
        run: command::rescue::run,
    },
    Verb {
        name: "resize",
        summary: "Make an image longer or shorter",
        synopsis: "[-f FMT | --image-opts] [--preallocation MODE] [--shrink] [-q] FILENAME [+|-]SIZE",
        options: &[
            HELP,
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            option(
                Opt::Preallocation,
                None,
                "preallocation",
                Some("MODE"),
                "space for what is new: off, metadata, falloc, full",
            ),
            option(Opt::Shrink, None, "shrink", None, "the image may get shorter, which loses data"),
            OBJECT,
        ],
        operands: &[FILENAME, ("SIZE", "the new size; with + or - the change")],
        run: command::resize::run,
    },
    Verb {
        name: "serve",
        summary: "Serve images to NBD clients, several at once, until a signal ends it",
        synopsis: "[--socket PATH]... [--listen HOST:PORT]... [-r] [-x NAME]... [-f FMT | --image-opts] [...] FILENAME...\n\nExample:\n  qcow2 serve --socket /run/disk.sock disk.qcow2\n  nbdinfo 'nbd+unix:///?socket=/run/disk.sock'",
        options: SERVE,
        operands: &[("FILENAME", "an image; each is an export of its own")],
        run: command::serve::run,
    },
    Verb {
        name: "snapshot",
        summary: "List, take, apply and delete the snapshots inside an image",
        synopsis: "[-f FMT | --image-opts] [-l | -a|-c|-d SNAPSHOT | --external NEW] [-U] [-q] FILENAME",
        options: &[
            HELP,
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            FORCE_SHARE,
            OBJECT,
            option(Opt::ListSnapshots, Some('l'), "list", None, "list the snapshots (the default)"),
            option(
                Opt::CreateSnapshot,
                Some('c'),
                "create",
                Some("SNAPSHOT"),
                "take a snapshot of that name",
            ),
            option(Opt::ApplySnapshot, Some('a'), "apply", Some("SNAPSHOT"), "go back to that snapshot"),
            option(Opt::DeleteSnapshot, Some('d'), "delete", Some("SNAPSHOT"), "delete that snapshot"),
            option(
                Opt::ExternalSnapshot,
                None,
                "external",
                Some("NEW"),
                "leave the image as it is and make NEW, an image on top of it that takes all changes",
            ),
        ],
        operands: &[FILENAME],
        run: command::snapshot::run,
    },
    Verb {
        name: "vet",
        summary: "Judge whether images of unknown origin are safe to accept",
        synopsis: "[-f FMT] [-U] [--output human|json] FILENAME...",
        options: &[HELP, FORMAT, OUTPUT, FORCE_SHARE],
        operands: &[("FILENAME", "an image; exit code 0: safe, 1: cannot be judged, 2: not safe")],
        run: command::vet::run,
    },
];

/// Options of every verb.
pub(crate) static COMMON: &[OptionSpec] = &[
    own_value(
        Opt::Follow,
        "follow",
        "WHICH",
        "names inside images to open: none, same-directory or all (all)",
    ),
    own(Opt::Untrusted, "untrusted", "open no name inside images, and limit what they may cost"),
    own_value(
        Opt::Policy,
        "policy",
        "LIST",
        "limits, as in the variable QCOW2_POLICY: depth=2,memory=64M,...",
    ),
];

/// Options before the verb.
pub(crate) static GENERAL: &[OptionSpec] = &[
    HELP,
    option(Opt::Version, Some('V'), "version", None, "show the version and exit"),
    option(Opt::Trace, Some('T'), "trace", Some("TRACE"), "accepted; there are no trace events"),
    own(Opt::Describe, "describe", "print every verb and option as JSON and exit"),
];

/// The verb called `name`.
pub(crate) fn find_verb(name: &str) -> Option<&'static Verb> {
    VERBS.iter().find(|verb| verb.name == name)
}

/// The verb that somebody meant who typed `name`.
pub(crate) fn meant_verb(name: &str) -> Option<&'static str> {
    nearest(name, VERBS.iter().map(|verb| verb.name))
}

/// Whether qemu-img has a verb `name` that this program lacks.
pub(crate) fn known_but_missing(name: &str) -> bool {
    const MISSING: [&str; 0] = [];
    MISSING.contains(&name)
}

static CONVERT: &[OptionSpec] = &[
    HELP,
    QUIET,
    OBJECT,
    IMAGE_OPTS,
    option(Opt::ImageOpts, None, "source-image-opts", None, "as --image-opts"),
    option(Opt::Format, Some('f'), "source-format", Some("FMT"), "format of the sources"),
    option(Opt::Cache, Some('T'), "source-cache", Some("CACHE"), "cache mode of the sources (writeback)"),
    option(Opt::Snapshot, Some('l'), "snapshot", Some("SNAPSHOT"), "read this snapshot of the source"),
    option(
        Opt::SparseSize,
        Some('S'),
        "sparse-size",
        Some("SIZE"),
        "zeroes from this length on become holes (4k)",
    ),
    option(Opt::TargetFormat, Some('O'), "output-format", Some("FMT"), "format of the target (raw)"),
    OPTIONS,
    option(Opt::TargetCache, Some('t'), "output-cache", Some("CACHE"), "cache mode of the target (unsafe)"),
    option(Opt::Backing, Some('B'), "backing", Some("FILE"), "backing file of the target"),
    BACKING_FORMAT,
    FORCE_SHARE,
    option(Opt::TargetImageOpts, None, "target-image-opts", None, "TARGET is an option string"),
    option(Opt::Salvage, None, "salvage", None, "take unreadable parts for zeroes"),
    option(Opt::TargetIsZero, None, "target-is-zero", None, "the existing target reads as zeroes (with -n)"),
    option(Opt::Bitmaps, None, "bitmaps", None, "copy persistent bitmaps too"),
    option(Opt::SkipBrokenBitmaps, None, "skip-broken-bitmaps", None, "leave out damaged bitmaps"),
    option(Opt::Rate, Some('r'), "rate", Some("RATE"), "bytes a second at most"),
    option(Opt::Parallel, Some('m'), "parallel", Some("COUNT"), "workers, 1 to 16"),
    option(Opt::OutOfOrder, Some('W'), "oob-writes", None, "write in any order"),
    option(Opt::CopyRange, Some('C'), "copy-range-offloading", None, "let the system copy where it can"),
    short(Opt::Compress, 'c', "compress"),
    short(Opt::NoCreate, 'n', "write into an existing target"),
    short(Opt::Progress, 'p', "show progress"),
    JSON_PROGRESS,
    // Names that the help of qemu-img gives, though it does not know them.
    advertised(Opt::Progress, "progress", None, "as -p"),
    advertised(Opt::Compress, "compress", None, "as -c"),
    advertised(Opt::NoCreate, "no-create", None, "as -n"),
    advertised(Opt::Snapshot, "source-snapshot", Some("SNAPSHOT"), "as -l"),
    advertised(Opt::TargetFormat, "target-format", Some("FMT"), "as -O"),
    advertised(Opt::Options, "target-options", Some("OPTIONS"), "as -o"),
    advertised(Opt::TargetCache, "target-cache", Some("CACHE"), "as -t"),
];

static BITMAP: &[OptionSpec] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    option(Opt::AddBitmap, None, "add", None, "make the bitmap, recording"),
    option(Opt::Granularity, Some('g'), "granularity", Some("SIZE"), "bytes a bit stands for (with --add)"),
    option(Opt::RemoveBitmap, None, "remove", None, "delete the bitmap"),
    option(Opt::ClearBitmap, None, "clear", None, "forget what it has recorded"),
    option(Opt::EnableBitmap, None, "enable", None, "record from now on"),
    option(Opt::DisableBitmap, None, "disable", None, "record no more"),
    option(Opt::MergeBitmap, None, "merge", Some("SOURCE"), "take in what the bitmap SOURCE has recorded"),
    option(Opt::Backing, Some('b'), "source-file", Some("FILE"), "the image that SOURCE is in"),
    option(Opt::BackingFormat, Some('F'), "source-format", Some("FMT"), "format of that image"),
    OBJECT,
];

static BENCH: &[OptionSpec] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    OptionSpec { own: true, ..OBJECT },
    FORCE_SHARE,
    WRITE_CACHE,
    option(Opt::RequestCount, Some('c'), "count", Some("COUNT"), "how many requests (75000)"),
    option(Opt::Depth, Some('d'), "depth", Some("DEPTH"), "how many requests at a time (64)"),
    option(Opt::StartOffset, Some('o'), "offset", Some("OFFSET"), "where the first request is (0)"),
    option(Opt::BufferSize, Some('s'), "buffer-size", Some("SIZE"), "bytes of a request (4k)"),
    option(Opt::StepSize, Some('S'), "step-size", Some("STEP"), "bytes from one request to the next (SIZE)"),
    option(Opt::Write, Some('w'), "write", None, "write instead of reading"),
    option(Opt::Pattern, None, "pattern", Some("BYTE"), "the byte to write (0)"),
    option(Opt::FlushInterval, None, "flush-interval", Some("COUNT"), "flush after every COUNT writes"),
    option(Opt::NoDrain, None, "no-drain", None, "flush while requests are running"),
    option(Opt::Aio, Some('i'), "aio", Some("AIO"), "accepted: threads, native, io_uring"),
    option(Opt::Native, Some('n'), "native", None, "past the page cache"),
    option(
        Opt::Threads,
        None,
        "threads",
        Some("COUNT"),
        "threads that send requests (one a core, at most DEPTH)",
    ),
];

static RESCUE: &[OptionSpec] = &[
    HELP,
    option(Opt::TargetFormat, Some('O'), "target-format", Some("FMT"), "format of TARGET (by its ending)"),
    option(Opt::ClusterSize, None, "cluster-size", Some("SIZE"), "bytes of a cluster (what the file tells)"),
    option(Opt::Size, None, "size", Some("SIZE"), "bytes of the disk (what the header tells)"),
    option(Opt::L1Table, None, "l1-table", Some("OFFSET"), "read this L1 table, of a snapshot for example"),
    option(Opt::Backing, Some('b'), "backing", Some("FILE"), "its backing file (none is opened by name)"),
    BACKING_FORMAT,
    option(Opt::DataFile, None, "data-file", Some("FILE"), "its external data file"),
    option(Opt::Progress, Some('p'), "progress", None, "show progress"),
    OUTPUT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_spelling_means_two_things() {
        for verb in VERBS {
            for (i, a) in verb.options.iter().enumerate() {
                for b in &verb.options[i + 1..] {
                    assert!(a.short.is_none() || a.short != b.short, "{}: {:?}", verb.name, a.short);
                    assert!(a.long.is_none() || a.long != b.long, "{}: {:?}", verb.name, a.long);
                }
            }
        }
    }

    #[test]
    fn spellings_of_one_option_agree_on_a_value() {
        for verb in VERBS {
            for a in verb.options {
                for b in verb.options.iter().filter(|b| b.opt == a.opt) {
                    assert_eq!(a.value.is_some(), b.value.is_some(), "{}: {:?}", verb.name, a.opt);
                }
            }
        }
    }
}
