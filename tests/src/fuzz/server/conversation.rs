//! Connections that are mostly valid, drawn from decisions.

use super::disk::CONTEXTS;
use qcow2_nbd::blocking::server::PIECE;
use qcow2_nbd::proto::{
    Command, InfoKind, MAX_OPTION_DATA, Mode, OptionCode, OptionHead, OptionRequest, Request, command_flag,
    encode_client_flags,
};
use qcow2_testkit::rng::Rng;

/// The longest payload that is really sent; of longer ones only the length is.
const MAX_PAYLOAD: u64 = PIECE as u64 + 200_000;

/// Draws a connection from `bytes`. `choice`: bits 3 and 4 are the mode, bit 5 leaves the damage off.
pub(super) fn draw(choice: u8, size: u64, bytes: &[u8]) -> Vec<u8> {
    let mut rng = Rng::from_bytes(bytes);
    let mode =
        [Mode::Simple, Mode::Structured, Mode::Extended, Mode::Structured][usize::from(choice >> 3 & 3)];
    let mut sent = Vec::new();
    encode_client_flags(rng.pick(&[3, 3, 3, 3, 3, 3, 1, 0, 2, 7]), &mut sent);
    for _ in 0..rng.below(3) {
        aside(&mut rng, &mut sent);
    }
    match mode {
        Mode::Simple => {}
        Mode::Structured => OptionRequest::plain(OptionCode::STRUCTURED_REPLY).encode(&mut sent),
        Mode::Extended => OptionRequest::plain(OptionCode::EXTENDED_HEADERS).encode(&mut sent),
    }
    let export = if rng.one_in(8) { "" } else { "disk" }.to_owned();
    if !rng.one_in(4) {
        contexts(&mut rng, true, &mut sent);
    }
    match rng.below(4) {
        0 => OptionRequest::ExportName(export).encode(&mut sent),
        _ => info(&mut rng, true, export, &mut sent),
    }
    // Requests on a large disk are long, too.
    let requests = if size > 1 << 20 { 5 } else { 24 };
    for number in 0..=rng.below(requests) {
        request(&mut rng, (number as u8, mode, size), &mut sent);
    }
    if choice & 32 == 0 && rng.one_in(3) {
        let at = rng.below(sent.len() as u64) as usize;
        match rng.below(3) {
            0 => sent.truncate(at),
            1 => sent[at] ^= 1 << rng.below(8),
            _ => sent[at] = rng.pick(&[0, 1, 0x7f, 0x80, 0xff]),
        }
    }
    sent
}

/// An option that leads nowhere, in most cases.
fn aside(rng: &mut Rng, sent: &mut Vec<u8>) {
    let plain = OptionRequest::plain;
    match rng.below(10) {
        0 => plain(OptionCode::LIST).encode(sent),
        1 => plain(OptionCode::STARTTLS).encode(sent),
        2 => contexts(rng, false, sent),
        3 => contexts(rng, true, sent),
        4 => info(rng, false, "disk".to_owned(), sent),
        5 => info(rng, true, "none".to_owned(), sent),
        6 => {
            let len = MAX_OPTION_DATA + rng.pick(&[0, 1]);
            OptionHead { option: OptionCode(rng.below(13) as u32), len }.encode(sent);
            sent.resize(sent.len() + len as usize, 7);
        }
        7 => plain(OptionCode::STRUCTURED_REPLY).encode(sent),
        8 => {
            let len = rng.pick(&[1, 4096, 4097, 1 << 20, 1 << 21, u32::MAX]);
            OptionHead { option: OptionCode(rng.below(13) as u32), len }.encode(sent);
        }
        _ => {
            let data = (0..rng.below(12)).map(|_| rng.below(256) as u8).collect();
            OptionRequest::Other { option: OptionCode(rng.below(14) as u32), data }.encode(sent);
        }
    }
}

fn info(rng: &mut Rng, go: bool, export: String, sent: &mut Vec<u8>) {
    let wanted = (0..rng.below(4)).map(|_| InfoKind(rng.below(5) as u16)).collect();
    OptionRequest::Info { go, export, wanted }.encode(sent);
}

fn contexts(rng: &mut Rng, set: bool, sent: &mut Vec<u8>) {
    let export = rng.pick(&["disk", "disk", "disk", "disk", "", "none"]).to_owned();
    let names = [&CONTEXTS[..], &["base:", "qemu:", "qemu:dirty-bitmap:", ":", "", "other"]].concat();
    let queries = (0..rng.below(4)).map(|_| rng.pick(&names).to_owned()).collect();
    OptionRequest::MetaContext { set, export, queries }.encode(sent);
}

fn request(rng: &mut Rng, (number, mode, size): (u8, Mode, u64), sent: &mut Vec<u8>) {
    let (read, write, zeroes) = (Command::READ, Command::WRITE, Command::WRITE_ZEROES);
    let status = Command::BLOCK_STATUS;
    let rare = Command(rng.pick(&[2, 3, 3, 3, 5, 5, 8, 9, 0xffff]));
    let trim = Command::TRIM;
    let command =
        rng.pick(&[read, read, read, write, write, write, write, zeroes, trim, status, status, rare]);
    let piece = PIECE as u64;
    let len = match rng.below(8) {
        0 => rng.pick(&[0, 1, size, size + 1, u64::from(u32::MAX), u64::MAX, 32 << 20]),
        1 | 2 if size > 1 << 20 => rng.pick(&[piece - 1, piece, piece + 1, piece + 100_000]),
        3 | 4 => rng.pick(&[512, 4096, 32 << 10, (32 << 10) + 1, 64 << 10, (64 << 10) + 1]),
        _ => 1 + rng.below(20_000),
    };
    let len = if mode == Mode::Extended { len } else { len.min(u32::MAX.into()) };
    let offset = match rng.below(6) {
        0 => 0,
        1 => size.saturating_sub(len),
        2 => rng.pick(&[1, size, size - 1, u64::MAX, 1 << 63]),
        3 => (size / 8 * 5).saturating_sub((len / 2).saturating_mul(rng.below(3))),
        _ => rng.below(size),
    };
    let mut flags = match rng.below(6) {
        0 => rng.below(64) as u16,
        1 => command_flag::FUA,
        2 if command == read => command_flag::DF,
        2 if command == status => command_flag::REQ_ONE,
        _ => 0,
    };
    if mode == Mode::Extended && command == write && !rng.one_in(8) {
        flags |= command_flag::PAYLOAD_LEN;
    }
    let cookie = if rng.one_in(4) { rng.next_u64() } else { number.into() };
    let request = Request { command, flags, cookie, offset, len };
    request.encode(mode, sent).expect("a length that the headers have room for");
    let payload = if command == write { len } else { request.payload_len(mode) };
    if payload > MAX_PAYLOAD || rng.one_in(32) {
        return;
    }
    // Runs of zeroes among the bytes, for holes.
    let (fill, run) = (0x81 + number % 0x20, 1 + rng.below(9000) as usize);
    sent.extend((0..payload as usize).map(|at| if at / run % 2 == 0 { fill } else { 0 }));
}
