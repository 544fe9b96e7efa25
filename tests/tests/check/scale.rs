//! Large images.
