//! Which files a chain is made of, noted while it is opened.

use qcow2_core::{ImageFormat, Reference, ResolveError, ResolvedSource, Resolver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The files of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerFiles {
    /// The image file.
    pub image: String,
    /// The external data file.
    pub data: Option<String>,
    /// Whether the image file is a raw disk.
    pub raw: bool,
    /// The name by which the layer above calls it.
    pub recorded: String,
}

impl LayerFiles {
    /// The file that holds the guest's bytes.
    pub fn data_file(&self) -> &str {
        self.data.as_deref().unwrap_or(&self.image)
    }
}

/// Notes which files a chain is made of while it is opened.
pub(super) struct Recorder {
    inner: Arc<dyn Resolver>,
    files: Arc<Mutex<Vec<LayerFiles>>>,
}

impl Resolver for Recorder {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        let is_backing = matches!(reference, Reference::Backing { .. });
        if is_backing {
            // Noted before it is opened: a failure is then this layer's.
            let (recorded, raw) = match reference {
                Reference::Backing { name, format } => (name.to_owned(), format == Some("raw")),
                _ => (String::new(), false),
            };
            self.lock().push(LayerFiles { recorded, raw, ..LayerFiles::default() });
        }
        let mut source = self.inner.resolve(reference, writable)?;
        if let Some(layer) = self.lock().last_mut() {
            match is_backing {
                true => {
                    (layer.image, layer.raw) = (source.name.clone(), source.format == ImageFormat::Raw);
                }
                false => layer.data = Some(source.name.clone()),
            }
        }
        source.resolver = Arc::new(Self { inner: source.resolver, files: Arc::clone(&self.files) });
        Ok(source)
    }

    fn has_chosen(&self, reference: Reference<'_>) -> bool {
        self.inner.has_chosen(reference)
    }
}

impl Recorder {
    /// `inner`, whose files are noted in the list, after those of the layer `top`.
    pub(super) fn on(
        inner: Arc<dyn Resolver>,
        top: LayerFiles,
    ) -> (Arc<dyn Resolver>, Arc<Mutex<Vec<LayerFiles>>>) {
        let files = Arc::new(Mutex::new(vec![top]));
        (Arc::new(Self { inner, files: Arc::clone(&files) }), files)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<LayerFiles>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
