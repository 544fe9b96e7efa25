//! Cross-crate suites; see `tests/`.
