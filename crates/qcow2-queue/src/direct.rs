//! Requests whose bytes lie in a file as the guest sees them, by io_uring.

#[cfg(target_os = "linux")]
pub(crate) use linux::Direct;
#[cfg(not(target_os = "linux"))]
pub(crate) use other::Direct;

use crate::request::{Completion, Request};

/// What became of a request.
pub(crate) enum Tried {
    /// It is in flight.
    Started,
    /// It needed no I/O.
    Done(Completion),
    /// It has to go another way.
    No(Request),
}

#[cfg(target_os = "linux")]
mod linux {
    use super::Tried;
    use crate::request::{Completion, Request};
    use crate::threads::Wake;
    use qcow2_core::format::CryptMethod;
    use qcow2_core::{
        ExtentState, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, InPlace, Pin, Storage,
    };
    use qcow2_io::{FilePart, FileRing, FileStorage, IoBuffer, Transfer};
    use std::io;

    /// A request in more parts than this goes to the threads.
    const MAX_PARTS: usize = 16;

    /// A disk and the ring for its files.
    pub(crate) struct Direct<'d> {
        ring: FileRing<'d, Begun<'d>>,
        layers: Vec<Layer<'d>>,
        /// True if nothing is below the lowest layer.
        to_the_bottom: bool,
        parts: Vec<FilePart>,
    }

    /// What a request keeps until it has finished.
    struct Begun<'d> {
        token: u64,
        /// Keeps the clusters where they are.
        _hold: Option<Hold<'d>>,
    }

    #[expect(dead_code, reason = "they are held, not looked at")]
    enum Hold<'d> {
        Read(Pin<'d>),
        Write(InPlace<'d>),
    }

    /// A layer, and the file that has its bytes.
    #[derive(Clone, Copy)]
    struct Layer<'d> {
        disk: &'d dyn GuestDisk,
        /// `None` for a raw disk.
        image: Option<&'d Image>,
        file: &'d FileStorage,
        /// Writes are allowed, and nothing between the disk and the file wants to know of them.
        writes: bool,
    }

    impl<'d> Layer<'d> {
        fn of(disk: &'d dyn GuestDisk) -> Option<Self> {
            if disk.filtered().is_some() {
                // It wants to see each request.
                return None;
            }
            let (image, storage, writes) = match (disk.as_raw(), disk.as_image()) {
                (Some(raw), _) => (None, &**raw.storage(), raw.is_writable()),
                // That of an image is asked at each write.
                (None, Some(image)) => (Some(image), &**image.data_storage()?, true),
                (None, None) => return None,
            };
            if image.is_some_and(|image| image.header().crypt_method != CryptMethod::None) {
                return None;
            }
            let file = storage.copy_source()?.downcast_ref::<FileStorage>()?;
            let writes = writes && std::ptr::addr_eq::<dyn Storage, FileStorage>(storage, file);
            Some(Self { disk, image, file, writes })
        }
    }

    impl<'d> Direct<'d> {
        /// `None` if `disk` has no such layer at its top, or the system refuses.
        pub(crate) fn new(disk: &'d dyn GuestDisk, depth: u32) -> Option<Self> {
            let mut layers = vec![Layer::of(disk)?];
            let mut below = disk.backing();
            while let Some(layer) = below.and_then(|below| Layer::of(&**below)) {
                layers.push(layer);
                below = layer.disk.backing();
            }
            let last = layers.last().and_then(|layer| layer.image);
            let to_the_bottom =
                below.is_none() && last.is_none_or(|image| image.backing_reference().is_none());
            let ring = FileRing::new(depth).ok()?;
            Some(Self { ring, layers, to_the_bottom, parts: Vec::new() })
        }

        pub(crate) fn waker(&self) -> Wake {
            let waker = self.ring.waker();
            Box::new(move || waker.wake())
        }

        pub(crate) fn in_flight(&self) -> usize {
            self.ring.in_flight()
        }

        pub(crate) fn submit(&mut self) -> io::Result<()> {
            self.ring.submit()
        }

        pub(crate) fn wait(&mut self) -> io::Result<()> {
            self.ring.wait()
        }

        pub(crate) fn poll(&mut self, to: &mut Vec<Completion>) {
            self.ring.poll(|Transfer { payload, buffer, result }| {
                let result = result.map_err(qcow2_core::Error::from);
                to.push(Completion { token: payload.token, buffer: Some(buffer), result });
            });
        }

        pub(crate) fn start(&mut self, token: u64, request: Request) -> Tried {
            match request {
                Request::Read { offset, buffer } if !buffer.is_empty() => self.read(token, offset, buffer),
                Request::Write { offset, buffer } if !buffer.is_empty() => self.write(token, offset, buffer),
                other => Tried::No(other),
            }
        }

        fn read(&mut self, token: u64, offset: GuestOffset, mut buffer: IoBuffer) -> Tried {
            let top = self.layers[0];
            let pin = match top.image {
                Some(image) => match image.try_pin() {
                    Some(pin) => Some(pin),
                    None => return Tried::No(Request::Read { offset, buffer }),
                },
                None => None,
            };
            self.parts.clear();
            let Some(level) = self.find(offset, &mut buffer, pin.as_ref()) else {
                return Tried::No(Request::Read { offset, buffer });
            };
            if self.parts.is_empty() {
                return Tried::Done(Completion { token, buffer: Some(buffer), result: Ok(()) });
            }
            let begun = Begun { token, _hold: pin.map(Hold::Read) };
            match self.ring.read(begun, self.layers[level].file, buffer, &self.parts) {
                Ok(()) => Tried::Started,
                Err((_, buffer)) => Tried::No(Request::Read { offset, buffer }),
            }
        }

        /// Finds out where the bytes are, and fills in the zeroes among them: the parts, all in the file of
        /// the layer that is returned. `None`: not all of them can be read so, or something is wrong, which
        /// the other way will say.
        fn find(
            &mut self,
            offset: GuestOffset,
            buffer: &mut IoBuffer,
            pin: Option<&Pin<'_>>,
        ) -> Option<usize> {
            let (mut done, mut level) = (0, None);
            while done < buffer.len() {
                let at = GuestOffset::new(offset.value().checked_add(done as u64)?);
                let range = GuestRange::new(at, (buffer.len() - done) as u64)?;
                let (found, len, host) = self.place(range, pin)?;
                let bytes = done..done + len as usize;
                done = bytes.end;
                let Some(host) = host else {
                    buffer[bytes].fill(0);
                    continue;
                };
                if *level.get_or_insert(found) != found || self.parts.len() == MAX_PARTS {
                    return None;
                }
                match self.parts.last_mut() {
                    Some(last)
                        if last.bytes.end == bytes.start
                            && last.offset.checked_add(last.bytes.len() as u64) == Some(host) =>
                    {
                        last.bytes.end = bytes.end;
                    }
                    _ => self.parts.push(FilePart { bytes, offset: host }),
                }
            }
            Some(level.unwrap_or(0))
        }

        /// The layer that has the first bytes of `range`, how many, and where; no place: they are zeroes.
        fn place(
            &self,
            range: GuestRange,
            pin: Option<&Pin<'_>>,
        ) -> Option<(usize, u64, Option<HostOffset>)> {
            let (start, mut len) = (range.start(), range.len());
            for (level, layer) in self.layers.iter().enumerate() {
                let inside = layer.disk.size().saturating_sub(start.value());
                if level > 0 && inside == 0 {
                    return Some((level, len, None));
                }
                if level == 0 && inside < len {
                    return None;
                }
                len = len.min(inside);
                let Some(image) = layer.image else {
                    return Some((level, len, Some(HostOffset::new(start.value()))));
                };
                let here = GuestRange::new(start, len)?;
                let extent = match pin.filter(|_| level == 0) {
                    Some(pin) => pin.cached_extent_at(here),
                    // Nobody changes a layer below the top.
                    None => image.try_pin()?.cached_extent_at(here),
                };
                let extent = extent.ok()??;
                len = len.min(extent.len);
                match extent.state {
                    ExtentState::Unallocated => {}
                    ExtentState::Zero { .. } => return Some((level, len, None)),
                    ExtentState::Data { host: Some(host) } => return Some((level, len, Some(host))),
                    ExtentState::Data { host: None } | ExtentState::Compressed => return None,
                }
            }
            self.to_the_bottom.then_some((0, len, None))
        }

        fn write(&mut self, token: u64, offset: GuestOffset, buffer: IoBuffer) -> Tried {
            let top = self.layers[0];
            let no = |buffer| Tried::No(Request::Write { offset, buffer });
            let Some(range) = GuestRange::new(offset, buffer.len() as u64).filter(|_| top.writes) else {
                return no(buffer);
            };
            let (host, hold) = match top.image {
                None if range.end().value() > top.disk.size() => return no(buffer),
                None => (HostOffset::new(offset.value()), None),
                Some(image) => match image.try_write_in_place(range) {
                    Ok(Some(place)) => (place.host(), Some(Hold::Write(place))),
                    Ok(None) | Err(_) => return no(buffer),
                },
            };
            let part = FilePart { bytes: 0..buffer.len(), offset: host };
            match self.ring.write(Begun { token, _hold: hold }, top.file, buffer, &part) {
                Ok(()) => Tried::Started,
                Err((_, buffer)) => no(buffer),
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use super::Tried;
    use crate::request::{Completion, Request};
    use crate::threads::Wake;
    use qcow2_core::GuestDisk;
    use std::io;
    use std::marker::PhantomData;

    /// There is no io_uring.
    pub(crate) enum Direct<'d> {
        #[expect(dead_code, reason = "there is none")]
        None(std::convert::Infallible, PhantomData<&'d ()>),
    }

    impl<'d> Direct<'d> {
        pub(crate) fn new(_disk: &'d dyn GuestDisk, _depth: u32) -> Option<Self> {
            None
        }

        pub(crate) fn waker(&self) -> Wake {
            Box::new(|| {})
        }

        pub(crate) fn in_flight(&self) -> usize {
            0
        }

        pub(crate) fn submit(&mut self) -> io::Result<()> {
            Ok(())
        }

        pub(crate) fn wait(&mut self) -> io::Result<()> {
            Ok(())
        }

        pub(crate) fn poll(&mut self, _to: &mut Vec<Completion>) {}

        pub(crate) fn start(&mut self, _token: u64, request: Request) -> Tried {
            Tried::No(request)
        }
    }
}
