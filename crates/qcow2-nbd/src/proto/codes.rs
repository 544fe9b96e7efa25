//! Numbers with names. Each is an open set: a peer may send one that has no name here.

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident($number:ty) { $($(#[$item:meta])* $code:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $number);

        impl $name {
            $($(#[$item])* pub const $code: Self = Self($value);)*
        }
    };
}

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident: $number:ty { $($(#[$item:meta])* $flag:ident = $bit:expr,)* }) => {
        $(#[$doc])*
        pub mod $name {
            $($(#[$item])* pub const $flag: $number = 1 << $bit;)*
        }
    };
}

codes! {
    /// An option of the handshake.
    OptionCode(u32) {
        /// Chooses an export and begins transmission; the old way, whose refusal is the end.
        EXPORT_NAME = 1,
        /// Ends the handshake.
        ABORT = 2,
        /// Asks for the names of all exports.
        LIST = 3,
        /// Begins TLS.
        STARTTLS = 5,
        /// Asks about an export.
        INFO = 6,
        /// Asks about an export and begins transmission.
        GO = 7,
        /// Asks for structured replies.
        STRUCTURED_REPLY = 8,
        /// Asks which meta contexts there are.
        LIST_META_CONTEXT = 9,
        /// Chooses meta contexts.
        SET_META_CONTEXT = 10,
        /// Asks for extended headers.
        EXTENDED_HEADERS = 11,
    }
}

codes! {
    /// A reply to an option. Those with the highest bit are refusals.
    ReplyKind(u32) {
        /// The option was accepted; the last reply.
        ACK = 1,
        /// An export of a list.
        SERVER = 2,
        /// A fact about an export.
        INFO = 3,
        /// A meta context.
        META_CONTEXT = 4,
        /// The option is not known.
        UNSUPPORTED = 1 << 31 | 1,
        /// The server does not want to.
        POLICY = 1 << 31 | 2,
        /// The option makes no sense here.
        INVALID = 1 << 31 | 3,
        /// The server's platform cannot.
        PLATFORM = 1 << 31 | 4,
        /// Only after TLS.
        TLS_REQUIRED = 1 << 31 | 5,
        /// No such export.
        UNKNOWN = 1 << 31 | 6,
        /// The server is ending.
        SHUTDOWN = 1 << 31 | 7,
        /// Only for clients that ask for block sizes.
        BLOCK_SIZE_REQUIRED = 1 << 31 | 8,
        /// The option is too long.
        TOO_BIG = 1 << 31 | 9,
        /// Only with extended headers.
        EXTENDED_HEADERS_REQUIRED = 1 << 31 | 10,
    }
}

impl ReplyKind {
    /// True for a refusal.
    pub fn is_error(self) -> bool {
        self.0 >> 31 == 1
    }
}

codes! {
    /// A fact about an export.
    InfoKind(u16) {
        /// Size and transmission flags.
        EXPORT = 0,
        /// The name the server has for it.
        NAME = 1,
        /// A text for people.
        DESCRIPTION = 2,
        /// Limits of a request's size.
        BLOCK_SIZE = 3,
    }
}

codes! {
    /// A request of the transmission phase.
    Command(u16) {
        /// Reads bytes.
        READ = 0,
        /// Writes bytes.
        WRITE = 1,
        /// Disconnects; has no reply.
        DISCONNECT = 2,
        /// Makes durable what was written.
        FLUSH = 3,
        /// The bytes are not needed any more.
        TRIM = 4,
        /// The bytes will be read soon.
        CACHE = 5,
        /// Writes zeroes.
        WRITE_ZEROES = 6,
        /// Asks for the extents of the chosen meta contexts.
        BLOCK_STATUS = 7,
    }
}

codes! {
    /// An error of the transmission phase; 0 is none. The numbers are Linux's.
    ErrorCode(u32) {
        /// Success.
        NONE = 0,
        /// Not permitted.
        PERM = 1,
        /// Input or output failed.
        IO = 5,
        /// Out of memory.
        NO_MEMORY = 12,
        /// Invalid argument.
        INVALID = 22,
        /// No space left.
        NO_SPACE = 28,
        /// Too large for one chunk.
        OVERFLOW = 75,
        /// Not supported.
        NOT_SUPPORTED = 95,
        /// The server is ending.
        SHUTDOWN = 108,
    }
}

codes! {
    /// What a chunk of a reply contains. Those with the highest bit are errors.
    ChunkKind(u16) {
        /// Nothing.
        NONE = 0,
        /// Bytes of a read.
        OFFSET_DATA = 1,
        /// Bytes of a read that are zeroes.
        OFFSET_HOLE = 2,
        /// Extents with numbers of 32 bits.
        BLOCK_STATUS = 5,
        /// Extents with numbers of 64 bits.
        BLOCK_STATUS_EXT = 6,
        /// An error.
        ERROR = 1 << 15 | 1,
        /// An error at an offset.
        ERROR_OFFSET = 1 << 15 | 2,
    }
}

impl ChunkKind {
    /// True for an error.
    pub fn is_error(self) -> bool {
        self.0 >> 15 == 1
    }
}

flags! {
    /// Flags of the greeting and of the client's answer.
    handshake_flag: u16 {
        /// Options may be refused without closing the connection.
        FIXED_NEWSTYLE = 0,
        /// No 124 zeroes follow the reply to an export's name.
        NO_ZEROES = 1,
    }
}

flags! {
    /// What an export is and can do.
    transmission_flag: u16 {
        /// Always set.
        HAS_FLAGS = 0,
        /// It cannot be changed.
        READ_ONLY = 1,
        /// It has flush.
        SEND_FLUSH = 2,
        /// It has the flag FUA.
        SEND_FUA = 3,
        /// It is a disk that turns.
        ROTATIONAL = 4,
        /// It has trim.
        SEND_TRIM = 5,
        /// It has write zeroes.
        SEND_WRITE_ZEROES = 6,
        /// It has the flag DF.
        SEND_DF = 7,
        /// A flush of one connection covers the others.
        CAN_MULTI_CONN = 8,
        /// It has cache.
        SEND_CACHE = 10,
        /// It has the flag FAST_ZERO.
        SEND_FAST_ZERO = 11,
        /// A block status may name its contexts.
        BLOCK_STATUS_PAYLOAD = 12,
    }
}

flags! {
    /// Flags of a request.
    command_flag: u16 {
        /// The reply comes after the bytes are durable.
        FUA = 0,
        /// Zeroes keep their space.
        NO_HOLE = 1,
        /// The bytes of a read come in one chunk.
        DF = 2,
        /// One extent is enough.
        REQ_ONE = 3,
        /// Zeroes only if that is fast.
        FAST_ZERO = 4,
        /// With extended headers: the length is that of a payload.
        PAYLOAD_LEN = 5,
    }
}

flags! {
    /// Flags of a chunk.
    chunk_flag: u16 {
        /// The last chunk of its reply.
        DONE = 0,
    }
}

flags! {
    /// Bits of an extent of the meta context `base:allocation`.
    state: u64 {
        /// Not allocated.
        HOLE = 0,
        /// Reads as zeroes.
        ZERO = 1,
    }
}
