//! What others send us besides images: names and options that people type, LUKS headers, a server's replies.

use qcow2_blockdev::{
    ImageChanges, ImageName, KeyValues, Naming, NewOptions, NewTarget, Options, escape_commas, filename,
    parse_size, parse_switch, read_number, read_size,
};
use qcow2_core::{HostOffset, ImageFormat, SectorNumbering, Storage, ZeroMode};
use qcow2_crypt::Secret;
use qcow2_crypt::luks::{IterationLimit, Volume};
use qcow2_io::{MemoryStorage, NbdStorage};
use qcow2_testkit::rng::Rng;
use std::io::{self, Read, Write};

/// Takes the bytes as the name of a disk, as a list of options and as a number. The first byte chooses the
/// format that is given with the name.
pub fn names(data: &[u8]) {
    let Some((&choice, text)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let format = [None, Some("raw"), Some("qcow2"), Some("luks"), Some("x")][usize::from(choice % 5)];
    let plain = Naming::default().with_format(format.map(str::to_owned));
    for naming in [plain, Naming::default().as_list(true)] {
        if let Ok(name) = ImageName::parse(&text, &naming) {
            let shown = filename(&name.node, "raw");
            assert_eq!(filename(&name.node, "raw"), shown);
            let _ = (name.path(), name.guess_warning(&ImageFormat::Raw));
        }
    }
    let _ = (NewTarget::parse(&text), Options::from_list(&text), Options::from_json(&text));
    for number in [read_size("size", &text).ok(), parse_size(&text).ok()].into_iter().flatten() {
        assert_eq!(parse_size(&number.to_string()).ok(), Some(number), "{text:?} as a size");
    }
    let _ = (read_number("number", &text), parse_switch(&text));
    options(&text);
}

fn options(text: &str) {
    let list = KeyValues::parse_image_options(&[text.to_owned()]);
    for format in [ImageFormat::Qcow2, ImageFormat::Raw, ImageFormat::Luks] {
        if let Ok(options) = NewOptions::parse(&format, &list) {
            let _ = options.preallocation();
            assert!(options.values().all(|(name, _)| options.given(name)));
        }
    }
    let _ = (KeyValues::parse_pairs(text, Some("id")), ImageChanges::parse(&ImageFormat::Qcow2, &list));
    let again = KeyValues::parse_pairs(&format!("key={}", escape_commas(text)), None);
    let value = again.ok().and_then(|pairs| pairs.last("key").map(str::to_owned));
    assert_eq!(value.as_deref(), Some(text), "an escaped value reads back");
}

/// The most key derivation rounds of an input; the limit is ours to choose, and rounds are slow.
const ROUNDS: u64 = 300;
/// The longest area of key slots that is laid out.
const MAX_AREA: u64 = 1 << 20;

/// Takes the bytes as a LUKS header, tries a password on it and plans changes of its slots.
pub fn luks_header(data: &[u8]) {
    let Ok(volume) = Volume::parse(data) else { return };
    let written = volume.header().encode().expect("what was read can be written");
    assert_eq!(Volume::parse(&written).ok().as_ref(), Some(&volume), "an encoded header parses");
    let storage = MemoryStorage::new();
    storage.write_at(HostOffset::new(0), data).expect("memory takes the bytes");
    if volume.payload_offset() <= MAX_AREA {
        storage.set_len(volume.payload_offset().max(data.len() as u64)).expect("memory grows");
    }
    let (password, limit) = (Secret::new(b"abc".to_vec()), IterationLimit(ROUNDS));
    let _ = volume.unlock(&storage, HostOffset::new(0), &password, limit);
    let _ = volume.unlock(&storage, HostOffset::new(u64::MAX - 4096), &password, limit);
    let free = volume.free_slot();
    assert_eq!(free.is_none(), volume.active_slots().count() == 8);
    for wanted in [None, Some(0), Some(7), Some(8), Some(u64::MAX)] {
        for force in [false, true] {
            if let Ok(slot) = volume.slot_to_fill(wanted, force) {
                assert!(slot < 8 && (force || free.is_some()), "slot {slot}");
            }
        }
    }
    let _ = volume.cipher(&Secret::new(vec![0x5a; volume.spec().key_len()]), SectorNumbering::Host);
}

/// A server whose replies are known before the requests.
struct Server(io::Cursor<Vec<u8>>);

impl Read for Server {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Server {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes of the export that is read.
const EXPORT_SIZE: u64 = 8192;

/// Takes the bytes as all that a server ever sends. One input in two, by its first byte, has a whole
/// handshake and the frames of its replies in place, and only what is in them is drawn from the bytes.
pub fn nbd_replies(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else { return };
    let sent = if choice & 1 == 0 { rest.to_vec() } else { conversation(choice, rest) };
    let Ok(disk) = NbdStorage::over(Server(io::Cursor::new(sent)), "", choice & 2 != 0) else { return };
    let size = disk.len().expect("the size was agreed on");
    let mut buf = [0; 1024];
    for step in 0..6u64 {
        let at = HostOffset::new(step * 700);
        if let Ok(read) = disk.read_at(at, &mut buf) {
            assert_eq!(read as u64, size.saturating_sub(at.value()).min(1024));
        }
        let asked = 4096.min(size.saturating_sub(at.value()));
        if let Ok(extent) = disk.extent_at(at, asked) {
            assert!(extent.len <= asked && (extent.len > 0 || asked == 0), "{extent:?} of {asked}");
        }
        let _ = (disk.write_at(at, &buf[..512]), disk.write_zeroes(at, 512, ZeroMode::MayUnmap));
        let _ = (disk.discard(at, 512), disk.flush());
    }
}

/// A handshake, and replies to the requests that follow.
fn conversation(choice: u8, bytes: &[u8]) -> Vec<u8> {
    let mut rng = Rng::from_bytes(bytes);
    let (structured, allocation, extended) = (choice & 4 != 0, choice & 8 != 0, choice & 16 != 0);
    let mut sent = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let mut option = |option: u32, kind: u32, data: &[u8]| {
        sent.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
        [option, kind, data.len() as u32].iter().for_each(|word| sent.extend(word.to_be_bytes()));
        sent.extend(data);
    };
    option(11, if extended { 1 } else { 1 << 31 | 1 }, &[]);
    if !extended {
        option(8, if structured { 1 } else { 1 << 31 | 1 }, &[]);
    }
    if structured || extended {
        if allocation {
            option(10, 4, b"\0\0\0\x01base:allocation");
        }
        option(10, 1, &[]);
    }
    let flags = (rng.next_u64() as u16 | 1).to_be_bytes();
    if rng.one_in(3) {
        let sizes = [rng.pick(&[1u32, 512, 4096]), 4096, rng.pick(&[4096u32, 1 << 20, u32::MAX])];
        let sizes: Vec<u8> = sizes.iter().flat_map(|size| size.to_be_bytes()).collect();
        option(7, 3, &[&[0, 3][..], &sizes].concat());
    }
    option(7, 3, &[&[0, 0][..], &EXPORT_SIZE.to_be_bytes(), &flags].concat());
    option(7, 1, &[]);
    for cookie in 1..20u64 {
        reply(&mut rng, (structured, extended), cookie, &mut sent);
    }
    sent
}

fn reply(rng: &mut Rng, (structured, extended): (bool, bool), cookie: u64, sent: &mut Vec<u8>) {
    let cookie = if rng.one_in(16) { rng.next_u64() } else { cookie };
    if !(structured || extended) || rng.one_in(if extended { 32 } else { 4 }) {
        sent.extend(0x6744_6698_u32.to_be_bytes());
        sent.extend(rng.pick(&[0u32, 0, 0, 5, 28, 75, 1 << 31]).to_be_bytes());
        sent.extend(cookie.to_be_bytes());
        sent.extend(vec![7; rng.pick(&[0, 512, 1024])]);
        return;
    }
    for last in (0..=rng.below(3)).rev() {
        let status = if extended { 6 } else { 5 };
        let kind = rng.pick(&[0u16, 1, 1, 2, 2, status, status, 0x8001, 0x8002, 0x7fff]);
        let inside = rng.below(EXPORT_SIZE);
        let offset = rng.pick(&[0, 512, 700, 1024, inside, u64::MAX]);
        let payload = match kind {
            1 => [&offset.to_be_bytes()[..], &vec![3; rng.pick(&[0, 1, 324, 512, 1024])]].concat(),
            2 => [&offset.to_be_bytes()[..], &(rng.below(2048) as u32).to_be_bytes()].concat(),
            5 => {
                let mut words = vec![u32::from(!rng.one_in(8))];
                words.extend((0..2 * rng.below(4)).map(|_| rng.pick(&[0, 1, 2, 3, 512, 4096, u32::MAX])));
                words.iter().flat_map(|word| word.to_be_bytes()).collect()
            }
            6 => {
                let count = rng.below(4);
                let mut bytes = [u32::from(!rng.one_in(8)), count as u32].map(u32::to_be_bytes).concat();
                for _ in 0..2 * count {
                    let number = rng.pick(&[0u64, 1, 2, 3, 512, 4096, 1 << 40, u64::MAX]);
                    bytes.extend(number.to_be_bytes());
                }
                bytes
            }
            _ => (0..rng.below(20)).map(|_| rng.below(256) as u8).collect(),
        };
        let len = if rng.one_in(16) { rng.next_u64() as u32 } else { payload.len() as u32 };
        sent.extend(if extended { 0x6e8a_278c_u32 } else { 0x668e_33ef }.to_be_bytes());
        sent.extend(u16::from(last == 0 && !rng.one_in(16)).to_be_bytes());
        sent.extend(kind.to_be_bytes());
        sent.extend(cookie.to_be_bytes());
        if extended {
            sent.extend([0; 12]);
        }
        sent.extend(len.to_be_bytes());
        sent.extend(payload);
    }
}
