//! Images that QEMU does not open because of their bitmaps.

use qcow2_core::format::Bitmap;
use qcow2_core::format::text::text_of;
use qcow2_ops::info::{BitmapDamage, BitmapFault as Fault};

/// Why an image is not opened whose bitmaps are damaged. `None` if QEMU does not mind.
pub(crate) fn bitmap_refusal(bitmaps: &[Bitmap], damage: &[BitmapDamage]) -> Option<String> {
    let name = |damage: &BitmapDamage| damage.index.and_then(|index| bitmaps.get(index)).map(c_text);
    damage.iter().find_map(|damage| refusal(damage.fault, &name(damage).unwrap_or_default()))
}

fn refusal(fault: Fault, name: &str) -> Option<String> {
    let table = |text| format!("Could not read bitmap_table table from image for bitmap '{name}': {text}");
    Some(match fault {
        Fault::DirectoryCut => "Broken bitmap directory".to_owned(),
        Fault::TooMany => "More bitmaps found than specified in header extension".to_owned(),
        Fault::TooFew => "Less bitmaps found than specified in header extension".to_owned(),
        Fault::ExtraData => "Bitmap extra data is not supported".to_owned(),
        // What is past the end it reads as zeroes, which are no entry.
        Fault::Entry | Fault::DirectoryPastEnd => format!("Bitmap '{name}' doesn't satisfy the constraints"),
        Fault::SameName => format!("Bitmap already exists: {name}"),
        Fault::TableOffset => table("Input/output error"),
        Fault::TableEntry => table("Invalid argument"),
        Fault::TableLength => format!("Could not read bitmap '{name}' from image: Invalid argument"),
        _ => return None,
    })
}

/// The name up to the first zero byte, where it ends in C.
fn c_text(bitmap: &Bitmap) -> String {
    text_of(bitmap.name.split(|&byte| byte == 0).next().unwrap_or_default())
}
