//! Command lines from a grammar: mostly valid ones on files that exist, some of them damaged.

use qcow2_testkit::rng::Rng;

/// qcow2 images of the start folder.
const QCOW2: [&str; 26] = [
    "t.qcow2",
    "base.qcow2",
    "x8",
    "s.qcow2",
    "o.qcow2",
    "orphan.qcow2",
    "comp.qcow2",
    "bm.qcow2",
    "used.qcow2",
    "ext.qcow2",
    "df.qcow2",
    "top.qcow2",
    "long.qcow2",
    "short.qcow2",
    "mid.qcow2",
    "v2.qcow2",
    "v2s.qcow2",
    "v2o.qcow2",
    "exto.qcow2",
    "shared.qcow2",
    "sz.qcow2",
    "shrunk.qcow2",
    "whole.qcow2",
    "jsback.qcow2",
    "leak.qcow2",
    "dirty.qcow2",
];
/// Images that need repair, and one that is cut off.
const DAMAGED: [&str; 10] = [
    "low.qcow2",
    "high.qcow2",
    "mixed.qcow2",
    "free.qcow2",
    "flag.qcow2",
    "l1flag.qcow2",
    "reserved.qcow2",
    "marked.qcow2",
    "dirtyleak.qcow2",
    "trunc.qcow2",
];
/// Raw disks of the start folder.
const RAW: [&str; 8] = ["r.raw", "base.raw", "h.raw", "odd.raw", "odd2.raw", "zero", "tiny", "rnd"];
const SIZES: [&str; 14] =
    ["0", "1", "511", "512", "64k", "1M", "1536k", "2M", "3M", "4M", "8M", "1G", "1.5M", "100000"];
const BAD_SIZES: [&str; 6] = ["", "-1", "foo", "1Q", "9E", "1M1"];
const CACHES: [&str; 5] = ["none", "writeback", "writethrough", "unsafe", "foo"];

/// A history of one to four command lines. Each begins with the name of the tool.
pub(super) fn history(rng: &mut Rng) -> Vec<String> {
    let lines = [1, 1, 1, 2, 2, 3, 4];
    (0..rng.pick(&lines)).map(|_| damaged_a_little(rng)).collect()
}

/// One line; one in twelve has a word too many, too few, or a character wrong.
fn damaged_a_little(rng: &mut Rng) -> String {
    let mut words = line(rng);
    if rng.one_in(12) {
        let at = 1 + rng.below(words.len() as u64 - 1) as usize;
        match rng.below(4) {
            0 => drop(words.remove(at)),
            1 => words.insert(at, words[at].clone()),
            2 => {
                let other = 1 + rng.below(words.len() as u64 - 1) as usize;
                words.swap(at, other);
            }
            _ => drop(words[at].pop()),
        }
    }
    words.join(" ")
}

/// The words of a line while it is made.
struct Words<'a> {
    rng: &'a mut Rng,
    words: Vec<String>,
}

impl Words<'_> {
    fn add(&mut self, text: impl Into<String>) -> &mut Self {
        self.words.push(text.into());
        self
    }

    /// Adds `words`, which are separated by blanks, in one of `n` lines.
    fn maybe(&mut self, n: u64, words: &str) -> &mut Self {
        if self.rng.one_in(n) {
            self.words.extend(words.split(' ').map(str::to_owned));
        }
        self
    }

    /// The same with one of several values.
    fn maybe_of(&mut self, n: u64, option: &str, values: &[&str]) -> &mut Self {
        if self.rng.one_in(n) {
            let value = self.rng.pick(values);
            self.add(option).add(value);
        }
        self
    }

    fn pick(&mut self, choices: &[&str]) -> String {
        self.rng.pick(choices).to_owned()
    }

    fn size(&mut self) -> String {
        if self.rng.one_in(15) { self.pick(&BAD_SIZES) } else { self.pick(&SIZES) }
    }

    fn qcow2(&mut self) -> String {
        match self.rng.below(12) {
            0 => self.pick(&DAMAGED),
            1 => self.new_name(),
            _ => self.pick(&QCOW2),
        }
    }

    /// Any image, sometimes one that is not there.
    fn image(&mut self) -> String {
        match self.rng.below(20) {
            0 => "nofile".to_owned(),
            1 => self.described(),
            2..=5 => self.pick(&RAW),
            _ => self.qcow2(),
        }
    }

    /// An image by another name than its path.
    fn described(&mut self) -> String {
        let (name, raw) = (self.pick(&QCOW2), self.pick(&RAW));
        match self.rng.below(5) {
            0 => format!("file:{name}"),
            1 => format!("./{name}"),
            2 => format!(r#"'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{name}"}}}}'"#),
            3 => format!(r#"'json:{{"driver":"raw","offset":512,"size":1024,"file.filename":"{raw}"}}'"#),
            _ => format!(r#"'json:{{"file.filename":"{name}"}}'"#),
        }
    }

    /// A file that an earlier line of the history may have made.
    fn new_name(&mut self) -> String {
        self.pick(&["n0", "n1", "n2.qcow2", "n3.raw"])
    }

    fn format(&mut self) -> String {
        self.pick(&["qcow2", "qcow2", "qcow2", "raw", "raw", "luks", "foo"])
    }

    /// `-o` with creation options of qcow2.
    fn creation(&mut self) -> &mut Self {
        let mut list = Vec::new();
        while list.is_empty() || (self.rng.one_in(2) && list.len() < 4) {
            list.push(self.pick(&[
                "compat=0.10",
                "compat=1.1",
                "compat=v3",
                "cluster_size=4k",
                "cluster_size=512",
                "cluster_size=2M",
                "cluster_size=3k",
                "lazy_refcounts=on",
                "refcount_bits=1",
                "refcount_bits=64",
                "refcount_bits=3",
                "extended_l2=on",
                "extended_l2=on,cluster_size=128k",
                "compression_type=zstd",
                "compression_type=foo",
                "preallocation=metadata",
                "preallocation=falloc",
                "preallocation=full",
                "data_file=n0",
                "data_file=n0,data_file_raw=on",
                "nocow=on",
                "size=3M",
                "backing_file=base.raw",
                "backing_fmt=raw",
                "foo=bar",
                "help",
            ]));
        }
        let list = list.join(",");
        self.add("-o").add(list)
    }
}

fn line(rng: &mut Rng) -> Vec<String> {
    let verb = rng.below(100);
    let mut words = Words { rng, words: Vec::new() };
    match verb {
        0..=7 => create(&mut words),
        8..=23 => convert(&mut words),
        24..=31 => info(&mut words),
        32..=37 => check(&mut words),
        38..=44 => map(&mut words),
        45..=50 => compare(&mut words),
        51..=57 => resize(&mut words),
        58..=63 => snapshot(&mut words),
        64..=68 => bitmap(&mut words),
        69..=73 => rebase(&mut words),
        74..=77 => commit(&mut words),
        78..=82 => amend(&mut words),
        83..=86 => measure(&mut words),
        87..=89 => dd(&mut words),
        90 => bench(&mut words),
        _ => io(&mut words),
    }
    words.words
}

fn create(w: &mut Words<'_>) {
    w.add("qemu-img").add("create").maybe(3, "-q");
    if !w.rng.one_in(6) {
        let format = w.format();
        w.add("-f").add(format);
    }
    if w.rng.one_in(2) {
        w.creation();
    }
    if w.rng.one_in(3) {
        let (image, format) = (w.image(), w.format());
        w.add("-b").add(image).maybe(8, "-u");
        if !w.rng.one_in(5) {
            w.add("-F").add(format);
        }
    }
    let name = w.new_name();
    w.add(name);
    if !w.rng.one_in(4) {
        let size = w.size();
        w.add(size);
    }
}

fn convert(w: &mut Words<'_>) {
    w.add("qemu-img").add("convert").maybe(8, "-p").maybe(6, "-c").maybe(12, "-U").maybe(8, "-W");
    w.maybe(10, "-n").maybe(20, "--target-is-zero").maybe(12, "--salvage").maybe(20, "--bitmaps");
    w.maybe_of(8, "-S", &["0", "4k", "512", "1M", "foo"]).maybe_of(12, "-m", &["1", "16", "17", "0"]);
    w.maybe_of(12, "-t", &CACHES).maybe_of(12, "-T", &CACHES).maybe_of(12, "-l", &["sn", "1", "nope"]);
    w.maybe_of(20, "-r", &["1M", "0", "foo"]);
    if w.rng.one_in(4) {
        let format = w.format();
        w.add("-f").add(format);
    }
    if !w.rng.one_in(6) {
        let format = w.format();
        w.add("-O").add(format);
    }
    if w.rng.one_in(5) {
        w.creation();
    }
    if w.rng.one_in(10) {
        let (image, format) = (w.image(), w.format());
        w.add("-B").add(image).add("-F").add(format);
    }
    let (source, target) = (w.image(), w.new_name());
    w.add(source);
    if w.rng.one_in(8) {
        let second = w.image();
        w.add(second);
    }
    if w.rng.one_in(15) {
        let existing = w.qcow2();
        w.add(existing);
    } else {
        w.add(target);
    }
}

fn info(w: &mut Words<'_>) {
    w.add("qemu-img").add("info").maybe(8, "-U").maybe(4, "--backing-chain").maybe(20, "--limits");
    w.maybe_of(2, "--output", &["json", "json", "human", "foo"]);
    let (format, image) = (w.format(), w.image());
    if w.rng.one_in(6) {
        w.add("-f").add(format);
    }
    w.add(image);
}

fn check(w: &mut Words<'_>) {
    w.add("qemu-img").add("check").maybe(10, "-q").maybe(8, "-U").maybe_of(4, "-T", &CACHES);
    w.maybe_of(4, "--output", &["json", "human", "foo"]).maybe_of(3, "-r", &["leaks", "all", "foo"]);
    let image = if w.rng.one_in(2) { w.pick(&DAMAGED) } else { w.image() };
    w.add(image);
}

fn map(w: &mut Words<'_>) {
    w.add("qemu-img").add("map").maybe(8, "-U").maybe_of(2, "--output", &["json", "json", "human", "foo"]);
    w.maybe_of(8, "-s", &["1M", "512", "100", "9M"]).maybe_of(8, "-l", &["1M", "512", "100", "0"]);
    let (format, image) = (w.format(), w.image());
    if w.rng.one_in(6) {
        w.add("-f").add(format);
    }
    w.add(image);
}

fn compare(w: &mut Words<'_>) {
    w.add("qemu-img").add("compare").maybe(10, "-q").maybe(10, "-s").maybe(10, "-p").maybe(10, "-U");
    w.maybe_of(8, "-f", &["qcow2", "raw", "foo"]).maybe_of(8, "-F", &["qcow2", "raw", "foo"]);
    w.maybe_of(12, "-T", &CACHES);
    let (one, two) = (w.image(), w.image());
    w.add(one).add(two);
}

fn resize(w: &mut Words<'_>) {
    w.add("qemu-img").add("resize").maybe(6, "-q").maybe(3, "--shrink");
    w.maybe_of(5, "--preallocation", &["off", "metadata", "falloc", "full", "foo"]);
    let (format, image, size) = (w.format(), w.image(), w.size());
    if w.rng.one_in(3) {
        w.add("-f").add(format);
    }
    let sign = w.pick(&["", "", "", "+", "-"]);
    w.add(image).add(format!("{sign}{size}"));
}

fn snapshot(w: &mut Words<'_>) {
    w.add("qemu-img").add("snapshot").maybe(10, "-q").maybe(12, "-U");
    let name = w.pick(&["sn", "a", "b", "1", "2", "new", "big", "small", "''"]);
    match w.rng.below(6) {
        0 | 1 => w.add("-l"),
        2 | 3 => w.add("-c").add(name),
        4 => w.add("-a").add(name),
        _ => w.add("-d").add(name),
    };
    let image = if w.rng.one_in(2) {
        w.pick(&["s.qcow2", "shared.qcow2", "sz.qcow2", "v2s.qcow2"])
    } else {
        w.image()
    };
    w.add(image);
}

fn bitmap(w: &mut Words<'_>) {
    w.add("qemu-img").add("bitmap");
    let action = w.pick(&[
        "--add",
        "--add",
        "--remove",
        "--clear",
        "--enable",
        "--disable",
        "--merge b0",
        "--merge nope",
    ]);
    w.words.extend(action.split(' ').map(str::to_owned));
    w.maybe(5, "--disable").maybe(20, "--enable").maybe_of(5, "-g", &["4k", "64k", "1k", "3k", "2G"]);
    w.maybe_of(10, "-F", &["qcow2", "raw"]).maybe_of(10, "-b", &["bm.qcow2", "s.qcow2"]);
    let image = if w.rng.one_in(3) { w.image() } else { w.pick(&["bm.qcow2", "used.qcow2", "s.qcow2"]) };
    let name = w.pick(&["b0", "b1", "b2", "nope"]);
    w.add(image).add(name);
}

fn rebase(w: &mut Words<'_>) {
    w.add("qemu-img")
        .add("rebase")
        .maybe(8, "-p")
        .maybe(5, "-u")
        .maybe(8, "-q")
        .maybe(12, "-c")
        .maybe(12, "-U");
    let base = if w.rng.one_in(5) { "''".to_owned() } else { w.image() };
    w.add("-b").add(base);
    let (format, image) = (w.format(), w.qcow2());
    if !w.rng.one_in(4) {
        w.add("-F").add(format);
    }
    w.add(image);
}

fn commit(w: &mut Words<'_>) {
    w.add("qemu-img").add("commit").maybe(6, "-q").maybe(4, "-d").maybe(8, "-p").maybe_of(8, "-t", &CACHES);
    w.maybe_of(5, "-b", &["s.qcow2", "o.qcow2", "b2.raw", "nope"]).maybe_of(12, "-r", &["1M", "foo"]);
    let image = w.qcow2();
    w.add(image);
}

fn amend(w: &mut Words<'_>) {
    w.add("qemu-img")
        .add("amend")
        .maybe(10, "-q")
        .maybe(8, "-p")
        .maybe(12, "--force")
        .maybe_of(12, "-t", &CACHES);
    let options = w.pick(&[
        "compat=0.10",
        "compat=1.1",
        "lazy_refcounts=on",
        "lazy_refcounts=off",
        "refcount_bits=8",
        "refcount_bits=1",
        "refcount_bits=64",
        "size=5M",
        "size=100",
        "backing_file=s.qcow2",
        "backing_fmt=qcow2",
        "data_file_raw=on",
        "cluster_size=64k",
        "compat=1.1,refcount_bits=32",
        "compat=0.10,refcount_bits=16",
        "size=6M,compat=0.10",
        "help",
        "foo=1",
    ]);
    w.add("-o").add(options);
    let image = w.image();
    w.add(image);
}

fn measure(w: &mut Words<'_>) {
    w.add("qemu-img").add("measure").maybe_of(3, "--output", &["json", "human", "foo"]);
    let format = w.format();
    if !w.rng.one_in(4) {
        w.add("-O").add(format);
    }
    if w.rng.one_in(3) {
        w.creation();
    }
    w.maybe_of(12, "-l", &["sn", "nope"]);
    if w.rng.one_in(3) {
        let size = w.size();
        w.add("--size").add(size);
    } else {
        let image = w.image();
        w.add(image);
    }
}

fn dd(w: &mut Words<'_>) {
    let (source, target) = (w.image(), w.new_name());
    w.add("qemu-img").add("dd").maybe(8, "-U");
    w.maybe_of(4, "-f", &["qcow2", "raw", "foo"]).maybe_of(2, "-O", &["qcow2", "raw", "luks", "foo"]);
    w.add(format!("if={source}")).add(format!("of={target}"));
    let operand = |w: &mut Words<'_>, n, name: &str, values: &[&str]| {
        if w.rng.one_in(n) {
            let value = w.pick(values);
            w.add(format!("{name}={value}"));
        }
    };
    operand(w, 2, "bs", &["512", "64k", "1000", "1M", "0", "foo"]);
    operand(w, 3, "count", &["0", "1", "3", "100", "foo"]);
    operand(w, 4, "skip", &["0", "1", "7", "9999", "-1"]);
}

fn bench(w: &mut Words<'_>) {
    // 75000 requests are too many.
    w.add("qemu-img")
        .add("bench")
        .maybe_of(1, "-c", &["1", "3", "0", "17", "foo"])
        .maybe(8, "-q")
        .maybe(12, "-U");
    w.maybe_of(4, "-s", &["512", "4k", "1M", "1000", "0", "3G"]).maybe_of(
        6,
        "-S",
        &["512", "64k", "0", "-1"],
    );
    w.maybe_of(5, "-o", &["0", "1M", "511", "9M"]).maybe_of(6, "-d", &["1", "3", "0", "foo"]).maybe(8, "-n");
    w.maybe_of(8, "-t", &CACHES).maybe_of(12, "-i", &["threads", "native", "io_uring", "foo"]);
    w.maybe(3, "-w").maybe_of(6, "--pattern", &["7", "256", "foo"]).maybe(12, "--no-drain");
    w.maybe_of(6, "--flush-interval", &["1", "2", "foo"]);
    let (format, image) = (w.format(), w.image());
    if w.rng.one_in(4) {
        w.add("-f").add(format);
    }
    w.add(image);
}

fn io(w: &mut Words<'_>) {
    w.add("qemu-io")
        .maybe(6, "-r")
        .maybe(10, "-n")
        .maybe(12, "-U")
        .maybe(12, "-d")
        .maybe_of(20, "-t", &CACHES);
    for _ in 0..=w.rng.below(3) {
        let (at, len) = (w.size(), w.size());
        let command = match w.rng.below(18) {
            0..=2 => format!("write -q -P {} {at} {len}", w.rng.below(256)),
            3 => format!("write -q -z {at} {len}"),
            4 => format!("write -q -z -u {at} {len}"),
            5 => format!("write -q -c {at} 64k"),
            6 => format!("read -q {at} {len}"),
            7 => format!("read -q -P {} {at} {len}", w.rng.below(3)),
            8 => format!("discard -q {at} {len}"),
            9 => format!("alloc {at} {len}"),
            10 => "map".to_owned(),
            11 => "length".to_owned(),
            12 => format!("truncate {len}"),
            13 => format!("truncate -m {} {len}", w.pick(&["off", "metadata", "falloc", "full", "foo"])),
            14 => format!("writev -q -P 4 {at} {len} 512"),
            15 => format!("readv -q -P 0 {at} 512 {len}"),
            16 => w.pick(&[
                "open -r t.qcow2",
                "open base.qcow2",
                "open nofile",
                "close",
                "open -o l2-cache-size=1M t.qcow2",
            ]),
            _ => w.pick(&["flush", "info", "help nope", "foo", "reopen -r", "reopen -w", "quit"]),
        };
        w.add("-c").add(format!("'{command}'"));
    }
    let (format, image) = (w.pick(&["qcow2", "raw"]), w.image());
    if w.rng.one_in(4) {
        w.add("-f").add(format);
    }
    w.add(image);
}
