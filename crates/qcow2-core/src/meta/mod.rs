//! The tables of an image: cached, changed, and written back in an order that survives a crash.
//!
//! Five parts, each with its own locks and no public field, each standing on those before it:
//! [`ImageFile`](file::ImageFile) (the files, and whether they may be written),
//! [`HeaderStore`](header::HeaderStore) (the header), [`Tables`](tables::Tables) (where tables may go, and
//! how they are written), [`RefcountStore`](refcount::RefcountStore) (which clusters are in use),
//! [`Mapping`](mapping::Mapping) (which guest range lives where). [`Flusher`](flush::Flusher) writes back
//! what they have changed; [`bulk`] changes whole trees of them at once.

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
