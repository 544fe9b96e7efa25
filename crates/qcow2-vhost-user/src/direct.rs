//! Moves bytes between a file and the memory of a guest, without a copy in between. The engine says where:
//! it prepares a write, the bytes are moved here, and the engine commits it.
//!
//! Where that is not possible (compressed, encrypted, from a backing file, through a filter, a file with
//! direct I/O) nothing is done, and the caller moves the bytes by way of a buffer.

use crate::guest::GuestBytes;
use qcow2_core::format::CryptMethod;
use qcow2_core::{ExtentState, GuestDisk, GuestRange, HostOffset, Image, Piece, Storage, ZeroMode};
use qcow2_io::FileStorage;
use vm_memory::VolatileSlice;

/// Zeroes that are written into a guest's memory at once, in bytes.
static ZEROES: [u8; 4096] = [0; 4096];

/// What was moved: bytes, or `None` if none can be.
type Moved = qcow2_core::Result<Option<usize>>;

/// Reads a first part of `range` into the next bytes of `to`.
pub(crate) fn read(disk: &dyn GuestDisk, range: GuestRange, to: &mut GuestBytes<'_>) -> Moved {
    let Some(live) = disk.as_live() else { return read_layer(disk, range, to) };
    read_layer(live.request().disk(), range, to)
}

/// Writes a first part of the next bytes of `from` to `range`.
pub(crate) fn write(disk: &dyn GuestDisk, range: GuestRange, from: &mut GuestBytes<'_>) -> Moved {
    let Some(live) = disk.as_live() else { return write_layer(disk, range, from) };
    if live.is_frozen() {
        return Ok(None);
    }
    write_layer(live.request().disk(), range, from)
}

fn read_layer(disk: &dyn GuestDisk, range: GuestRange, to: &mut GuestBytes<'_>) -> Moved {
    if disk.filtered().is_some() {
        // It wants to see each request.
        return Ok(None);
    }
    if let Some(raw) = disk.as_raw() {
        let Some(file) = file_of(&**raw.storage()) else { return Ok(None) };
        return read_file(file, HostOffset::new(range.start().value()), range.len() as usize, to);
    }
    let Some(image) = disk.as_image() else { return Ok(None) };
    // Until the bytes are read nobody frees the clusters that they are in.
    let pin = image.pin();
    let extent = pin.extent_at(range)?;
    let len = extent.len.min(range.len()) as usize;
    match extent.state {
        ExtentState::Zero { .. } => zero(len, to),
        ExtentState::Data { host: Some(host) } => {
            match image.data_storage().and_then(|storage| file_of(&**storage)) {
                Some(file) => read_file(file, host, len, to),
                None => Ok(None),
            }
        }
        _ => Ok(None),
    }
}

fn read_file(file: &FileStorage, at: HostOffset, len: usize, to: &mut GuestBytes<'_>) -> Moved {
    let read = file.read_to_guest(at, &to.peek(len))?;
    to.skip(read);
    // Past the end of the file are zeroes.
    zero(len - read, to)?;
    Ok(Some(len))
}

fn zero(len: usize, to: &mut GuestBytes<'_>) -> Moved {
    for slice in to.peek(len) {
        let mut at = 0;
        while let Ok(rest) = slice.offset(at)
            && !rest.is_empty()
        {
            rest.copy_from(&ZEROES);
            at += rest.len().min(ZEROES.len());
        }
    }
    to.skip(len);
    Ok(Some(len))
}

fn write_layer(disk: &dyn GuestDisk, range: GuestRange, from: &mut GuestBytes<'_>) -> Moved {
    if disk.filtered().is_some() {
        return Ok(None);
    }
    if let Some(raw) = disk.as_raw() {
        if !raw.is_writable() {
            return Ok(None);
        }
        let Some(file) = own_file(&**raw.storage()) else { return Ok(None) };
        let len = range.len() as usize;
        file.write_from_guest(HostOffset::new(range.start().value()), &from.peek(len))?;
        from.skip(len);
        return Ok(Some(len));
    }
    let Some(image) = disk.as_image() else { return Ok(None) };
    match image.data_storage() {
        Some(storage) if image.header().crypt_method == CryptMethod::None => {
            write_image(image, &**storage, range, from)
        }
        _ => Ok(None),
    }
}

fn write_image(image: &Image, storage: &dyn Storage, range: GuestRange, from: &mut GuestBytes<'_>) -> Moved {
    let Some(file) = own_file(storage) else { return Ok(None) };
    let ticket = image.prepare_write(range)?;
    let len = ticket.range().len() as usize;
    let own: Vec<VolatileSlice<'_>> = from.peek(len);
    for piece in ticket.pieces() {
        match piece {
            Piece::Guest { host } => file.write_from_guest(host, &own)?,
            Piece::Bytes { host, bytes } => storage.write_at(host, bytes)?,
            Piece::Zeroes { host, len } => storage.write_zeroes(host, len, ZeroMode::KeepAllocated)?,
            other => return Err(unknown(&other)),
        }
    }
    ticket.commit()?;
    from.skip(len);
    Ok(Some(len))
}

fn unknown(piece: &Piece<'_>) -> qcow2_core::Error {
    let text = format!("a piece of a write that is not known here: {piece:?}");
    qcow2_core::Error::new(qcow2_core::ErrorKind::Unsupported, text)
}

/// The file that `storage` reads from.
fn file_of(storage: &dyn Storage) -> Option<&FileStorage> {
    storage.copy_source()?.downcast_ref::<FileStorage>().filter(|file| file.moves_guest_memory())
}

/// The file that `storage` is, with nothing in between that wants to know of writes.
fn own_file(storage: &dyn Storage) -> Option<&FileStorage> {
    file_of(storage).filter(|file| std::ptr::addr_eq(storage, *file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::GuestOffset;
    use qcow2_image::{Disk, NewDisk};

    /// What reading and writing move of two clusters of 64 KiB, one written and one not.
    fn moved(make: impl FnOnce(NewDisk, &std::path::Path) -> Disk) -> [Option<usize>; 3] {
        let folder = tempfile::tempdir().unwrap();
        let disk = make(NewDisk::qcow2().size(1 << 20), &folder.path().join("disk"));
        disk.write_at(0, &[7; 65_536]).unwrap();
        let guest = disk.as_guest_disk();
        let mut memory = vec![1; 65_536];
        let whole = VolatileSlice::from(&mut memory[..]);
        let range = |at| GuestRange::new(GuestOffset::new(at), 65_536).unwrap();
        let bytes = || GuestBytes::of(vec![whole]);
        let data = read(&**guest, range(0), &mut bytes()).unwrap();
        if data.is_some() {
            let mut seen = vec![0_u8; 65_536];
            whole.copy_to(&mut seen);
            assert_eq!(seen, [7; 65_536]);
        }
        let none = read(&**guest, range(131_072), &mut bytes()).unwrap();
        [data, none, write(&**guest, range(0), &mut bytes()).unwrap()]
    }

    #[test]
    fn bytes_are_moved_where_file_and_memory_have_the_same() {
        let all = Some(65_536);
        // Where nothing is allocated a backing file may have something.
        assert_eq!(moved(|new, path| new.create(path).unwrap()), [all, None, all]);
        let raw = |_, path: &std::path::Path| NewDisk::raw().size(1 << 20).create(path).unwrap();
        assert_eq!(moved(raw), [all, all, all]);
        let encrypted = |new: NewDisk, path: &std::path::Path| {
            new.password("secret").unlock_time(std::time::Duration::from_millis(1)).create(path).unwrap()
        };
        assert_eq!(moved(encrypted), [None; 3]);
    }
}
