//! Changes of disks that are served, through a socket.
//!
//! A client sends one JSON object per line and gets one line for each, in order; events may come before it.
//!
//! ```text
//! {"command": "snapshot", "file": "monday.qcow2"}
//! {"return": {"top": "monday.qcow2", "below": "disk.qcow2", "pause-ns": 412345}}
//! {"command": "commit"}
//! {"event": "progress", "done": 1048576, "total": 4194304}
//! {"return": {"top": "disk.qcow2", "retired": "monday.qcow2", "pause-ns": 398765}}
//! {"command": "bitmap-clear", "bitmap": "b"}
//! {"error": "changing the bitmap: no bitmap 'b'"}
//! ```
//!
//! `pause-ns` is how long requests were held back at last. With several disks, `"disk"` names the export. A
//! member `"id"` of any kind comes back in the answer.
//!
//! | command | members | what happens |
//! |---|---|---|
//! | `query` | | the files of each disk, from the top down, with their formats and sizes |
//! | `statistics` | | what clients have done, with latencies |
//! | `metrics` | | the same as text for Prometheus |
//! | `snapshot` | `file` | the disk stays as it is in its file, and goes on in the new overlay `file` |
//! | `commit` | `depth` (0) | the layer below `depth` others is merged into the one below it |
//! | `backup` | `file`, `format` | the disk as it is now is copied into the new file, or over an export |
//! | `backup` | `file`, `format`, `bitmap`, `clear` (false) | only what the bitmap marks, over an earlier one |
//! | `snapshot-save`, `snapshot-delete` | `name` | a snapshot inside the top file |
//! | `snapshot-list` | | the snapshots inside the top file |
//! | `bitmap-add` | `bitmap`, `granularity` | a bitmap that records writes |
//! | `bitmap-remove`, `bitmap-clear`, `bitmap-enable`, `bitmap-disable` | `bitmap` | |
//! | `bitmap-merge` | `bitmap`, `source` | |
//! | `bitmap-list` | | |
//! | `resize` | `size` | bytes, not less than before |
//!
//! A backup's target is a new file, of the format qcow2 unless `format` says otherwise, or the raw disk of a
//! server (`nbd+unix:///?socket=PATH`), which is overwritten. With `bitmap` it is a disk that holds the
//! earlier backup, and `clear` makes the bitmap mark what changes from then on; if the backup fails it marks
//! again what it did. A file that was made for a failed backup is removed.
//!
//! An encrypted disk gets neither an overlay nor a new file: neither would be encrypted.
//!
//! # What to open after a crash
//!
//! `snapshot` and `commit` of the top change which file is the top. A server with a [`Record`] writes the
//! name of the new top into a small file before the new top is written to. `snapshot` works without one, and
//! its answer names the new top; `commit` of the top is refused.

mod answer;
mod backup;
mod command;
mod live;
mod metrics;
mod pause;
mod record;
mod serve;
mod socket;
mod top;

pub use backup::Backup;
pub use command::{Action, Command, CommandError};
pub use live::{Controlled, ControlledOptions};
pub use pause::Pauses;
pub use record::Record;
pub use serve::{Seen, live, serve};
pub use socket::{Client, Control, Operator};
pub use top::top;
