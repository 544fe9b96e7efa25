//! Fills a piece: walks the layers from the top down, once, until every cell has its answer.

use super::index::{Answer, Shape};
use crate::meta::mapping::{Mapping, Stored};
use ::alloc::vec;
use ::alloc::vec::Vec;

/// One of the merged layers: its disk size in bytes, and its mapping.
pub(crate) struct FillLayer<'a> {
    pub(crate) size: u64,
    pub(crate) mapping: &'a Mapping,
}

/// The cells of a piece while it is filled.
struct Cells {
    cell_bits: u32,
    /// Guest offset of the first one.
    start: u64,
    answers: Vec<Answer>,
    open: usize,
}

impl Cells {
    /// Answers for the cells of `len` bytes at `offset` that are open.
    fn answer(&mut self, offset: u64, len: u64, answer: impl Fn(u64) -> Answer) {
        let first = (offset - self.start) >> self.cell_bits;
        let count = len >> self.cell_bits;
        debug_assert!(len.is_multiple_of(1 << self.cell_bits), "{len} bytes are no whole cells");
        for (index, cell) in (0..).zip(&mut self.answers[first as usize..(first + count) as usize]) {
            if *cell == Answer::OPEN {
                *cell = answer(index);
                self.open -= 1;
            }
        }
    }
}

/// The runs of `piece`, in ascending order, all of it. `layers`: the merged ones, top first. `below`: the
/// answer where none of them has anything. Disk: reads parts of L2 tables. What cannot be read, or is
/// damaged, is an answer too: that layer is to be asked.
pub(crate) fn fill<'a>(
    shape: &Shape,
    piece: u64,
    layers: impl Iterator<Item = FillLayer<'a>>,
    below: Answer,
) -> Vec<u64> {
    let cells = shape.cells() as usize;
    let mut cells = Cells {
        cell_bits: shape.cell_bits,
        start: shape.start(piece),
        answers: vec![Answer::OPEN; cells],
        open: cells,
    };
    let end = cells.start.saturating_add(1 << shape.piece_bits);
    let mut table = Vec::new();
    for (number, layer) in layers.enumerate() {
        let inside = cut(&mut cells, number, layer.size, end);
        layer.mapping.scan(cells.start..inside, &mut table, &mut |offset, len, stored| {
            cells.answer(offset, len, |index| match stored {
                Stored::Zero => Answer::zero(number),
                Stored::Data(host) => Answer::data(number, (host.value() >> shape.cell_bits) + index),
                Stored::Unknown => Answer::from(number),
            });
        });
        if cells.open == 0 {
            break;
        }
    }
    runs(&cells.answers, below)
}

/// Behind the end of a layer below the first the chain reads as zeroes, whatever is further down. Returns
/// where the layer ends, or the piece, in whole cells: a cell that the end divides is left to the layer.
fn cut(cells: &mut Cells, number: usize, size: u64, end: u64) -> u64 {
    if size >= end {
        return end;
    }
    let unit = 1 << cells.cell_bits;
    let whole = size.max(cells.start);
    let (whole, after) = (whole & !(unit - 1), whole.next_multiple_of(unit));
    // Nobody asks the first layer for what is behind its end.
    let Some(above) = number.checked_sub(1) else {
        cells.answer(after, end - after, |_| Answer::nothing(0));
        return after;
    };
    cells.answer(whole, after - whole, |_| Answer::from(number));
    cells.answer(after, end - after, |_| Answer::nothing(above));
    whole
}

/// `answers` as runs; the open ones are `below`.
fn runs(answers: &[Answer], below: Answer) -> Vec<u64> {
    let mut runs = Vec::new();
    let mut first: Option<(u64, Answer)> = None;
    for (cell, answer) in (0..).zip(answers) {
        let answer = if *answer == Answer::OPEN { below } else { *answer };
        match first {
            Some((start, run)) if run.continues(cell - start, answer) => {}
            _ => {
                runs.push(answer.run(cell));
                first = Some((cell, answer));
            }
        }
    }
    runs
}
