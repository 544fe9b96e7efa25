//! Does the data I/O itself: the engine gives host offsets, and this program reads and writes there with its
//! own `pread` and `pwrite`, as an io_uring loop or a virtual machine monitor would.
//!
//! ```text
//! cargo run -p qcow2-core --example own_io
//! ```
#![allow(clippy::print_stdout)]
use qcow2_core::{
    CreateOptions, ExtentState, GuestOffset, GuestRange, Image, ImageFormat, OpenOptions, Piece,
    ResolvedSource,
};
use qcow2_io::OpenFile;
use std::error::Error;
use std::os::unix::fs::FileExt;

fn main() -> Result<(), Box<dyn Error>> {
    let file = tempfile::NamedTempFile::new()?;
    let storage = OpenFile::writable().open(file.path())?;
    let source = ResolvedSource::new(storage, ImageFormat::Qcow2, "example");
    let image = Image::create(source, &CreateOptions::new(64 << 20), &OpenOptions::writable())?;
    let own = file.reopen()?;

    // Write: prepare, move the bytes, commit.
    let message = b"written without the engine seeing a byte";
    let request = GuestRange::new(GuestOffset::new(5_000_000), message.len() as u64).ok_or("range")?;
    let ticket = image.prepare_write(request)?;
    assert_eq!(ticket.range(), request, "a short write is prepared as a whole");
    for piece in ticket.pieces() {
        match piece {
            Piece::Guest { host } => own.write_all_at(message, host.value())?,
            Piece::Bytes { host, bytes } => own.write_all_at(bytes, host.value())?,
            Piece::Zeroes { host, len } => own.write_all_at(&vec![0; len as usize], host.value())?,
            _ => return Err("a piece of an unknown kind".into()),
        }
    }
    ticket.commit()?;
    image.flush()?;

    // Read: pin the mapping, look up the host offset, read the bytes.
    let mut seen = vec![0; message.len()];
    let pin = image.pin();
    let extent = pin.extent_at(request)?;
    let ExtentState::Data { host: Some(host) } = extent.state else { return Err("not data".into()) };
    own.read_exact_at(&mut seen, host.value())?;
    drop(pin);
    assert_eq!(seen, message);
    println!(
        "guest offset {} is at host offset {host}: {:?}",
        request.start(),
        String::from_utf8_lossy(&seen)
    );
    image.close()?;
    Ok(())
}
