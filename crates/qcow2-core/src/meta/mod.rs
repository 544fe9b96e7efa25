//! The metadata of an image: cached, changed, and written back in an order that survives a crash.
//!
//! Five parts with private fields and locks of their own; each uses only those before it:
//! [`ImageFile`](file::ImageFile) (the files, whether they may be written),
//! [`HeaderStore`](header::HeaderStore) (the header), [`Tables`](tables::Tables) (where tables may be, and
//! all writes of tables), [`RefcountStore`](refcount::RefcountStore) (refcounts, allocation),
//! [`Mapping`](mapping::Mapping) (guest offsets to host offsets). [`Flusher`](flush::Flusher) writes back the
//! changes of all; [`bulk`] changes the refcounts of whole trees of tables.

pub(crate) mod bulk;
pub(crate) mod cache;
pub(crate) mod file;
pub(crate) mod flush;
pub(crate) mod guard;
pub(crate) mod header;
pub(crate) mod known;
pub(crate) mod mapping;
pub(crate) mod overlap;
pub(crate) mod page;
pub(crate) mod pending;
pub(crate) mod refcount;
pub(crate) mod run;
pub(crate) mod tables;
