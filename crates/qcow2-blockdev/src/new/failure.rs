//! Why an image was not made: one error for formats, options, files, keys and the engine.

use crate::driver::Driver;
use crate::failure::FailureKind;
use crate::keys::NoSecret;
use crate::scalar::OptionError;
use qcow2_core::{BackingName, ImageFormat, Preallocation, Refusal, StorageError, find_cause};
use qcow2_crypt::{CipherSpec, CryptError};
use qcow2_io::{OsError, SourceError};
use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;

/// An image that was not made, or options that there are not. `Display` is one sentence;
/// [`kind`](Self::kind) is what callers match, and [`cause`](Self::cause) finds an error of another crate
/// below it.
#[derive(Debug)]
pub struct CreateFailure(Box<(ImageFormat, CreateFailureKind)>);

/// What kind of trouble it is, with what a caller may want to know of it.
#[derive(Debug)]
#[non_exhaustive]
pub enum CreateFailureKind {
    /// No format has this name, or none that images can be made of here.
    UnknownFormat,
    /// The format is QEMU's name of something that makes no images.
    NoCreation,
    /// It is not known how long images of this format are.
    NoMeasurement,
    /// Images of this format cannot be amended.
    NoAmendment,
    /// The format has no such option.
    UnknownOption(String),
    /// The same of a change, and it is an option of new images.
    OnlyWhenCreated(String),
    /// A value that its option does not take.
    Option(OptionError),
    /// The space that a file system is to take at once is 4 GiB or more.
    ExtentSizeHint(u64),
    /// Options that exclude each other.
    Refused(Refusal),

    /// Encryption is asked for by two options, the second an old name of the first.
    EncryptedTwice,
    /// An option of encryption is given, and not its method.
    NoEncryptFormat,
    /// An option that the old AES method has no use for.
    NotWithAes(&'static str),
    /// A header without its payload is asked for.
    DetachedHeader,
    /// Nothing names the secret: the option that would.
    SecretNotNamed(&'static str),
    /// There is no such secret, or it is no password.
    NoSecret(NoSecret),
    /// Cipher, mode and initialization vectors do not go together.
    Cipher {
        /// What was asked for.
        spec: CipherSpec,
        /// Why it is not possible.
        error: CryptError,
    },
    /// The encryption header cannot be made.
    Crypt(CryptError),

    /// What is to be there already cannot be opened: a server's disk, a device.
    OutOfReach {
        /// What leads there.
        driver: Driver,
        /// Why it is not opened.
        reason: Arc<FailureKind>,
    },
    /// The file cannot be made, or not written to.
    NotWritable {
        /// Its name.
        path: String,
        /// The system's answer.
        error: OsError,
    },
    /// The file can be written to, but is not opened: others use it.
    File {
        /// Its name.
        path: String,
        /// Why.
        error: Box<SourceError>,
    },
    /// What is there already is smaller than the image.
    TooSmall(Driver),
    /// What is there already has its space.
    NothingToPreallocate(Preallocation),
    /// What is there already does not answer.
    Storage(StorageError),
    /// An image on a server's disk has no files beside it.
    DataFileOnServer,
    /// The name of the data file leads nowhere.
    DataFileName(Arc<FailureKind>),
    /// Whoever was asked before the first write has refused.
    Disagreed,
    /// The header has no room for a name.
    Name {
        /// The backing file, if the image has one.
        backing: Option<BackingName>,
        /// What does not fit.
        error: qcow2_core::Error,
    },
    /// The image cannot be written.
    Writing {
        /// What was allocated up front.
        preallocation: Preallocation,
        /// Whether the data is in the file of a qcow2 image.
        in_image: bool,
        /// Why.
        error: qcow2_core::Error,
    },
}

impl CreateFailure {
    pub(crate) fn new(format: &ImageFormat, kind: CreateFailureKind) -> Self {
        Self(Box::new((format.clone(), kind)))
    }

    /// The format that was asked for.
    pub fn format(&self) -> &ImageFormat {
        &self.0.0
    }

    /// What kind of trouble it is.
    pub fn kind(&self) -> &CreateFailureKind {
        &self.0.1
    }

    /// The kind alone.
    pub fn into_kind(self) -> CreateFailureKind {
        self.0.1
    }

    /// The first error of type `T` among the causes.
    pub fn cause<T: Error + 'static>(&self) -> Option<&T> {
        find_cause(self.kind())
    }

    /// Whether the file would be longer than its file system allows.
    pub fn is_too_long(&self) -> bool {
        let code = self.cause::<StorageError>().and_then(StorageError::os_code);
        let is_too_long = |code| io::Error::from_raw_os_error(code).kind() == io::ErrorKind::FileTooLarge;
        matches!(self.kind(), CreateFailureKind::Writing { .. }) && code.is_some_and(is_too_long)
    }
}

impl fmt::Display for CreateFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no {} image is made: {}", self.format().name(), self.kind())
    }
}

impl Error for CreateFailure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.kind().source()
    }
}

/// A sentence that follows "no image is made: ".
impl fmt::Display for CreateFailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownFormat => f.write_str("the formats of new images are qcow2, raw and luks"),
            Self::NoCreation => f.write_str("there are no images of this format"),
            Self::NoMeasurement => f.write_str("images of this format cannot be measured"),
            Self::NoAmendment => f.write_str("images of this format cannot be amended"),
            Self::UnknownOption(name) => write!(f, "the format has no option '{name}'"),
            Self::OnlyWhenCreated(name) => write!(f, "option '{name}' is for new images only"),
            Self::Option(error) => error.fmt(f),
            Self::ExtentSizeHint(bytes) => {
                write!(f, "the extent size hint is {bytes} bytes, allowed are less than 4 GiB")
            }
            Self::Refused(refusal) => refusal.fmt(f),
            Self::EncryptedTwice => f.write_str("'encryption' and 'encrypt.format' exclude each other"),
            Self::NoEncryptFormat => {
                f.write_str("'encrypt.format' is not given, but options of encryption are")
            }
            Self::DetachedHeader => f.write_str("a header is not made apart from its payload"),
            Self::NotWithAes(name) => write!(f, "option '{name}' is for LUKS"),
            Self::SecretNotNamed(option) => {
                write!(f, "option '{option}', which names the secret, is missing")
            }
            Self::NoSecret(error) => error.fmt(f),
            Self::Cipher { error, .. } | Self::Crypt(error) => error.fmt(f),
            Self::OutOfReach { driver, reason } => {
                write!(f, "'{}' makes no images, and what is there is not opened: {reason}", driver.name())
            }
            Self::NotWritable { path, error } => write!(f, "'{path}' cannot be made: {error}"),
            Self::File { error, .. } => error.fmt(f),
            Self::NothingToPreallocate(mode) => {
                write!(f, "preallocation is {}, what is there already allows off", mode.name())
            }
            Self::TooSmall(_) => f.write_str("what is there already is too small for the image"),
            Self::Storage(error) => error.fmt(f),
            Self::DataFileName(reason) => write!(f, "the data file cannot be made: {reason}"),
            Self::DataFileOnServer => f.write_str("a server's disk has no data file beside it"),
            Self::Disagreed => f.write_str("it was refused before anything was written"),
            Self::Name { .. } => f.write_str("the header has no room for a name"),
            Self::Writing { .. } => f.write_str("the image cannot be written"),
        }
    }
}

impl Error for CreateFailureKind {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Cipher { error, .. } | Self::Crypt(error) => error.source(),
            Self::OutOfReach { reason, .. } => reason.source(),
            Self::NotWritable { error, .. } => error.source(),
            Self::File { error, .. } => error.source(),
            Self::Storage(error) => error.source(),
            Self::Name { error, .. } | Self::Writing { error, .. } => Some(error),
            _ => None,
        }
    }
}

impl From<OptionError> for CreateFailureKind {
    fn from(error: OptionError) -> Self {
        Self::Option(error)
    }
}
