//! No text, whatever it is, makes the parsers panic, run on, or give a tree that cannot be shown again.

use qcow2_blockdev::{
    ImageName, KeyValues, Naming, NewTarget, Options, Secrets, filename, parse_size, read_number, read_size,
};

/// Texts that are understood, from which the others are made.
const SEEDS: &[&str] = &[
    "disk.qcow2",
    "file:a:b",
    "nbd://user@[::1]:10809/a%20b?socket=x",
    "nbd+unix:///x?socket=/a&socket=/b",
    "nbd:unix:/a:exportname=b",
    "blkdebug:rules.cfg:blkdebug::a",
    "null-co://",
    r#"json:{"driver": "qcow2", "file": {"driver": "blkdebug", "image": {"filename": "\ud83d\ude00"}}}"#,
    r#"json:{'driver':'raw','offset':-1.5e300,'size':18446744073709551616,"file":{"filename":null}}"#,
    "json:[[[{\"a\":[true,false,null]}]]]",
    "driver=qcow2,file.driver=nbd,file.server.type=inet,file.server.host=h,file.server.port=1,cache-size=1M",
    "driver=raw,offset=0x200,size=1.5k,file.filename=a,,b,no-thing,read-only",
    "driver=qcow2,file.filename=a,backing.backing.encrypt.key-secret=s,backing=,data-file.filename=d",
    "secret,id=a,data=YWJj,format=base64,keyid=k,iv=aWk=",
];

/// Pieces that parsers look for.
const PIECES: &[&str] = &[
    ":",
    "//",
    "=",
    ",",
    ",,",
    ".",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "'",
    "\\",
    "\\u",
    "\\ud800",
    "%",
    "%zz",
    "@",
    "?",
    "&",
    "json:",
    "file.",
    "backing.",
    "driver=",
    "null",
    "0",
    "-",
    "e9",
    "\0",
    "\n",
    "é",
    "\u{1f600}",
    "nbd:",
    "blkdebug:",
];

/// A generator of numbers, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, most: usize) -> usize {
        // The finalizer of splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % most.max(1) as u64) as usize
    }
}

/// `text` with a piece cut out, put in, or put in the place of another; between characters always.
fn mutated(text: &str, numbers: &mut Numbers) -> String {
    let mut places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    places.push(text.len());
    let (a, b) = (places[numbers.below(places.len())], places[numbers.below(places.len())]);
    let (start, end) = (a.min(b), a.max(b));
    let piece = PIECES[numbers.below(PIECES.len())];
    match numbers.below(4) {
        0 => format!("{}{}", &text[..start], &text[end..]),
        1 => format!("{}{piece}{}", &text[..start], &text[start..]),
        2 => format!("{}{piece}{}", &text[..start], &text[end..]),
        _ => format!("{}{}{}", &text[..end], &text[start..end], &text[end..]),
    }
}

fn parse_all(text: &str) {
    for is_list in [false, true] {
        for format in [None, Some("qcow2"), Some("nbd"), Some(text)] {
            let naming = Naming::default().as_list(is_list).with_format(format.map(str::to_owned));
            match ImageName::parse(text, &naming) {
                Ok(name) => {
                    assert!(
                        !filename(&name.node, "probed").is_empty() || name.path() == Some(""),
                        "{text:?}"
                    );
                    let _ = (name.node.driver(), name.keys.password(0, text, false));
                }
                Err(failure) => assert!(!failure.to_string().is_empty() && failure.layer() == 0, "{text:?}"),
            }
        }
    }
    let _ = (Options::from_json(text), Options::from_list(text), NewTarget::parse(text));
    let _ = (parse_size(text), read_size("a", text), read_number("a", text));
    let _ = (KeyValues::parse_pairs(text, Some("a")), KeyValues::parse_image_options(&[text.to_owned()]));
    if !text.contains("file=") {
        let _ = Secrets::default().define(text);
    }
}

#[test]
fn no_text_makes_a_parser_panic() {
    let mut numbers = Numbers(1);
    for seed in SEEDS {
        parse_all(seed);
        for _ in 0..300 {
            let mut text = (*seed).to_owned();
            for _ in 0..=numbers.below(8) {
                text = mutated(&text, &mut numbers);
                parse_all(&text);
            }
        }
    }
}

/// Deep texts end with an error and not with the stack.
#[test]
fn depth_is_bounded() {
    for text in [
        format!("json:{}", "[".repeat(1 << 16)),
        format!("json:{}", "{\"file\":".repeat(1 << 14)),
        format!("json:{}", "{\"file\":".repeat(1000) + "{\"filename\":\"a\"}" + &"}".repeat(1000)),
        format!("{}a", "blkdebug::".repeat(1 << 14)),
        format!("driver=qcow2,{}filename=a", "backing.".repeat(1 << 12)),
    ] {
        parse_all(&text);
    }
}

/// What is shown means the same again; but for a path with a colon, which QEMU shows without its `file:` too.
#[test]
fn a_shown_name_is_a_name() {
    for seed in SEEDS {
        for is_list in [false, true] {
            let Ok(name) = ImageName::parse(seed, &Naming::default().as_list(is_list)) else { continue };
            if name.path().is_some_and(|path| path.contains(':')) {
                continue;
            }
            let shown = filename(&name.node, "raw");
            let again = ImageName::parse(&shown, &Naming::default());
            let again = again.unwrap_or_else(|failure| panic!("{seed}: {shown}: {failure}"));
            assert_eq!(filename(&again.node, "raw"), shown, "{seed}");
        }
    }
}
