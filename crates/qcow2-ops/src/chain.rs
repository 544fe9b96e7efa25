//! Opens a backing chain layer by layer, from the top down to a base, and closes it again.

use crate::error::{Error, ErrorKind, Result};
use crate::port::{LayerRole, NextLayer, OpenChain};
use qcow2_core::chain::MAX_CHAIN_LEN;
use qcow2_core::{GuestDisk, ResolvedSource, SourceId};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

/// What is wrong with a backing chain whose layers can all be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChainError {
    /// The requested base is not in the chain; `None`: the image has no backing file.
    NoBase(Option<String>),
    /// A layer is the same file as a layer above it.
    Loop {
        /// Name of the layer.
        name: String,
        /// Number of layers above it.
        depth: usize,
    },
    /// The chain has more than this many layers.
    TooLong(usize),
}

impl fmt::Display for ChainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBase(Some(base)) => write!(f, "'{base}' is not in the backing chain"),
            Self::NoBase(None) => f.write_str("the image has no backing file"),
            Self::Loop { name, depth } => {
                write!(f, "'{name}', {depth} layers below the top, is in the backing chain already")
            }
            Self::TooLong(most) => write!(f, "backing chain has more than {most} layers"),
        }
    }
}

impl std::error::Error for ChainError {}

/// The layers of a chain, from the top down to its base.
pub(crate) struct OpenedChain {
    /// The layers above the base, top first, each opened without its backing file. The first is writable.
    pub(crate) above: Vec<Arc<dyn GuestDisk>>,
    /// The base with its own backing chain; writable.
    pub(crate) base: Arc<dyn GuestDisk>,
}

impl OpenedChain {
    /// Opens the chain from the top down to `base`. The file of a layer is opened before the image above it:
    /// opening an unclean image for writing repairs its refcounts, and nothing may change before it is known
    /// that the next layer exists. After an error the top is closed again.
    pub(crate) fn down_to(chain: &dyn OpenChain, base: Option<&str>) -> Result<Self> {
        let mut above = Vec::new();
        let opened = walk(chain, base, &mut above);
        if let (Err(_), Some(top)) = (&opened, above.first()) {
            // The error of the walk is the one to return.
            let _ = close(&**top);
        }
        Ok(Self { base: opened?, above })
    }

    /// Flushes and closes the base, then the top, which may have been emptied. The layers between them were
    /// only read. Both are closed even if one fails; the first error is returned.
    pub(crate) fn close(&self) -> Result<()> {
        let closed = close(&*self.base);
        let top = self.above.first().map_or(Ok(()), |top| close(&**top));
        closed.and(top)
    }
}

/// Flushes and closes a disk that was opened for writing.
pub(crate) fn close(disk: &dyn GuestDisk) -> Result<()> {
    let closed = disk.flush().and_then(|()| disk.as_image().map_or(Ok(()), |image| image.close()));
    closed.map_err(|e| Error::new(ErrorKind::Close, "closing the image").with_source(e))
}

/// Opens the layers above the base into `above` and returns the base.
fn walk(
    chain: &dyn OpenChain,
    base: Option<&str>,
    above: &mut Vec<Arc<dyn GuestDisk>>,
) -> Result<Arc<dyn GuestDisk>> {
    let failed = |e| Error::new(ErrorKind::Open, "opening the backing chain").with_boxed_source(e);
    let mut source = chain.open_top().map_err(failed)?;
    let mut seen: BTreeSet<SourceId> = source.id.into_iter().collect();
    loop {
        let depth = above.len();
        let role = if depth == 0 { LayerRole::Top } else { LayerRole::Middle };
        let below = chain.look_below(&source, depth, base).map_err(failed)?;
        if below == NextLayer::None {
            // Try to open the image first: if it cannot be opened, that error says more than a missing layer.
            above.push(chain.open_layer(source, depth, role).map_err(failed)?);
            let missing = ChainError::NoBase(base.map(str::to_owned));
            return Err(Error::new(ErrorKind::NotFound, "looking for the base").with_source(missing));
        }
        let next = chain.open_below(&source, depth + 1, below == NextLayer::Base).map_err(failed)?;
        check(&next, &mut seen, depth + 1)
            .map_err(|e| Error::new(ErrorKind::Open, "opening the backing chain").with_source(e))?;
        above.push(chain.open_layer(source, depth, role).map_err(failed)?);
        source = next;
        if below == NextLayer::Base {
            return chain.open_layer(source, depth + 1, LayerRole::Base).map_err(failed);
        }
    }
}

/// Refuses a layer that is the same file as one above it, and a chain that is too long. The engine has the
/// same two rules when it opens a chain.
fn check(next: &ResolvedSource, seen: &mut BTreeSet<SourceId>, depth: usize) -> Result<(), ChainError> {
    if depth + 1 > MAX_CHAIN_LEN {
        return Err(ChainError::TooLong(MAX_CHAIN_LEN));
    }
    match next.id {
        Some(id) if !seen.insert(id) => Err(ChainError::Loop { name: next.name.clone(), depth }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::CallerError;
    use qcow2_core::{Error as CoreError, ErrorKind as CoreKind, ImageFormat, RawDisk};
    use qcow2_io::MemoryStorage;
    use std::sync::Mutex;

    /// A chain whose layers are empty raw disks. Records every call.
    struct Listed {
        /// File id of each layer, from the top down.
        files: Vec<u64>,
        /// The layer whose image cannot be opened.
        broken: Option<usize>,
        log: Mutex<Vec<String>>,
    }

    impl Listed {
        fn new(files: &[u64]) -> Self {
            Self { files: files.to_vec(), broken: None, log: Mutex::default() }
        }

        fn note(&self, text: String) {
            self.log.lock().unwrap().push(text);
        }

        fn source(&self, depth: usize) -> ResolvedSource {
            let id = SourceId { device: 0, file: self.files[depth] };
            let storage = Arc::new(MemoryStorage::new());
            ResolvedSource::new(storage, ImageFormat::Raw, format!("{depth}")).with_id(Some(id))
        }
    }

    impl OpenChain for Listed {
        fn open_top(&self) -> Result<ResolvedSource, CallerError> {
            self.note("file 0 rw".into());
            Ok(self.source(0))
        }

        fn look_below(
            &self,
            _: &ResolvedSource,
            depth: usize,
            base: Option<&str>,
        ) -> Result<NextLayer, CallerError> {
            Ok(match base {
                _ if depth + 1 == self.files.len() => NextLayer::None,
                Some(base) if base != (depth + 1).to_string() => NextLayer::Middle,
                _ => NextLayer::Base,
            })
        }

        fn open_below(
            &self,
            _: &ResolvedSource,
            depth: usize,
            writable: bool,
        ) -> Result<ResolvedSource, CallerError> {
            self.note(format!("file {depth} {}", if writable { "rw" } else { "r" }));
            Ok(self.source(depth))
        }

        fn open_layer(
            &self,
            source: ResolvedSource,
            depth: usize,
            role: LayerRole,
        ) -> Result<Arc<dyn GuestDisk>, CallerError> {
            if self.broken == Some(depth) {
                return Err(CoreError::new(CoreKind::Corrupt, "broken").into());
            }
            self.note(format!("image {depth} {role:?}"));
            Ok(Arc::new(RawDisk::new(source.storage, true)?))
        }
    }

    #[track_caller]
    fn check_walk(chain: &Listed, base: Option<&str>, log: &str) -> Option<Error> {
        let opened = OpenedChain::down_to(chain, base);
        assert_eq!(chain.log.lock().unwrap().join(", "), log);
        opened.err()
    }

    #[track_caller]
    fn cause(error: Option<Error>) -> ChainError {
        error.unwrap().caller_error::<ChainError>().unwrap()
    }

    #[test]
    fn files_are_opened_before_the_images_above_them() {
        let log = "file 0 rw, file 1 rw, image 0 Top, image 1 Base";
        assert!(check_walk(&Listed::new(&[1, 2, 3]), None, log).is_none());
        let log = "file 0 rw, file 1 r, image 0 Top, file 2 rw, image 1 Middle, image 2 Base";
        assert!(check_walk(&Listed::new(&[1, 2, 3]), Some("2"), log).is_none());
    }

    #[test]
    fn missing_base_is_reported_unless_a_layer_does_not_open() {
        let error = check_walk(&Listed::new(&[1]), None, "file 0 rw, image 0 Top");
        assert_eq!(error.as_ref().unwrap().kind(), ErrorKind::NotFound);
        assert_eq!(cause(error), ChainError::NoBase(None));
        let log = "file 0 rw, file 1 r, image 0 Top, image 1 Middle";
        let error = check_walk(&Listed::new(&[1, 2]), Some("x"), log);
        assert_eq!(cause(error), ChainError::NoBase(Some("x".into())));
        // An image that cannot be opened is reported first.
        let broken = Listed { broken: Some(0), ..Listed::new(&[1]) };
        let error = check_walk(&broken, None, "file 0 rw").unwrap();
        assert_eq!((error.kind(), error.core_error().unwrap().kind()), (ErrorKind::Open, CoreKind::Corrupt));
    }

    #[test]
    fn loops_and_chains_above_the_limit_are_refused() {
        let log = "file 0 rw, file 1 r, image 0 Top, file 2 r";
        let error = check_walk(&Listed::new(&[1, 2, 1]), Some("x"), log);
        assert_eq!(cause(error), ChainError::Loop { name: "2".into(), depth: 2 });
        for (layers, refused) in [(MAX_CHAIN_LEN, false), (MAX_CHAIN_LEN + 1, true)] {
            let files: Vec<u64> = (0..layers as u64).collect();
            let opened = OpenedChain::down_to(&Listed::new(&files), Some(&(layers - 1).to_string()));
            assert_eq!(opened.is_err(), refused);
            if refused {
                assert_eq!(cause(opened.err()), ChainError::TooLong(MAX_CHAIN_LEN));
            }
        }
    }
}
