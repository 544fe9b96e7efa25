//! A disk as a standard `Read`, `Write` and `Seek` stream.

use crate::disk::Disk;
use std::io::{self, Read, Seek, SeekFrom, Write};

/// A position on a disk that implements [`Read`], [`Write`] and [`Seek`], for file system crates and
/// [`io::copy`]. Any number of cursors can be on one disk. Writing does not grow the disk.
/// [`flush`](Write::flush) makes changes durable; dropping the cursor does not.
///
/// ```
/// use qcow2_image::Disk;
/// use std::io::{Read, Seek, SeekFrom, Write};
///
/// let dir = tempfile::tempdir()?;
/// let disk = Disk::create(dir.path().join("disk.qcow2"), 1 << 20)?;
/// let mut cursor = disk.cursor();
/// cursor.seek(SeekFrom::End(-5))?;
/// cursor.write_all(b"hello")?;
/// cursor.seek(SeekFrom::Current(-3))?;
/// let mut text = String::new();
/// cursor.read_to_string(&mut text)?;
/// assert_eq!(text, "llo");
/// disk.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    disk: &'a Disk,
    at: u64,
}

impl Disk {
    /// A cursor at the start of the disk.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor { disk: self, at: 0 }
    }
}

impl Cursor<'_> {
    /// `len`, limited to the bytes left before the end of the disk; 0 past the end, which is not an error.
    fn room(&self, len: usize) -> usize {
        let left = self.disk.size().saturating_sub(self.at);
        usize::try_from(left).unwrap_or(usize::MAX).min(len)
    }
}

impl Read for Cursor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.room(buf.len());
        if len > 0 {
            self.disk.read_at(self.at, &mut buf[..len])?;
        }
        self.at += len as u64;
        Ok(len)
    }
}

impl Write for Cursor<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let len = self.room(buf.len());
        if len > 0 {
            self.disk.write_at(self.at, &buf[..len])?;
        }
        self.at += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(self.disk.flush()?)
    }
}

impl Seek for Cursor<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.disk.size().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek before the start"))?;
        Ok(self.at)
    }
}
