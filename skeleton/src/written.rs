//! The pages of its memory that an app writes to in a usual request, as it was
//! seen when it was built.
//!
//! An instance shares the pages of its snapshot until it writes to them. Most
//! of them it reads before that, and the kernel maps what is read together with
//! its neighbours. The first write then is a fault on a page that is mapped,
//! and all processors that run the host are interrupted to forget the old
//! mapping. So the tenant module has a start function that writes to these pages
//! first, what is in them anyway. That costs half of such a fault and disturbs
//! nobody, and it comes before the request.
//!
//! The list is a custom section [`SECTION`] of the component: the number of each
//! page in ascending order, little-endian, in four bytes. It is the app's own and changes nothing but
//! how much of its memory is its own from the start.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use wasm_encoder::{ComponentSection as _, CustomSection, Function, MemArg};
use wasmparser::BinaryReader;

use crate::sections::{Section, id};

const SECTION: &str = "written-pages";

/// Bytes of a page.
pub(crate) const PAGE: u32 = 4096;

/// Pages that an instance may write to before its app does.
const MAX_PAGES: usize = 2048;

/// Appends the list of `pages` to `component`; of more than there may be, the first ones.
pub(crate) fn append(component: &mut Vec<u8>, pages: &BTreeSet<u32>) {
    let list = pages.iter().take(MAX_PAGES).flat_map(|page| page.to_le_bytes()).collect::<Vec<_>>();
    CustomSection { name: SECTION.into(), data: list.into() }.append_to_component(component);
}

/// The pages that the component with these `sections` lists.
pub(crate) fn read(sections: &[Section<'_>]) -> Result<Vec<u32>> {
    for section in sections.iter().filter(|section| section.id == id::CUSTOM) {
        let mut reader = BinaryReader::new(section.content, 0);
        if reader.read_string()? != SECTION {
            continue;
        }
        let list = reader.read_bytes(reader.bytes_remaining())?;
        let (pages, rest) = list.as_chunks::<4>();
        let pages = pages.iter().map(|page| u32::from_le_bytes(*page)).collect::<Vec<_>>();
        ensure!(
            rest.is_empty() && pages.len() <= MAX_PAGES && pages.is_sorted_by(|one, next| one < next),
            "its list of written pages is not one"
        );
        return Ok(pages);
    }
    Ok(Vec::new())
}

/// The start function of a tenant module, in the making.
pub(crate) struct Writes {
    /// The addresses of the pages, and what is there from the start.
    bytes: Vec<(u32, u8)>,
}

impl Writes {
    /// Writes to `pages` of a memory of `size` bytes.
    pub(crate) fn new(pages: &[u32], size: u64) -> Result<Writes> {
        let byte = |page: &u32| {
            let address = u64::from(*page) * u64::from(PAGE);
            ensure!(address < size, "it lists a written page outside of its memory");
            Ok((u32::try_from(address)?, 0))
        };
        Ok(Writes { bytes: pages.iter().map(byte).collect::<Result<_>>()? })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes note of a segment of data, in the order in which they are copied.
    pub(crate) fn take(&mut self, start: u32, data: &[u8]) {
        let first = self.bytes.partition_point(|(address, _)| *address < start);
        for (address, byte) in &mut self.bytes[first..] {
            let Some(found) = data.get((*address - start) as usize) else { return };
            *byte = *found;
        }
    }

    /// The function.
    pub(crate) fn function(&self) -> Function {
        let mut function = Function::new([]);
        for (address, byte) in &self.bytes {
            let argument = MemArg { offset: 0, align: 0, memory_index: 0 };
            let mut instructions = function.instructions();
            instructions.i32_const(address.cast_signed()).i32_const(i32::from(*byte)).i32_store8(argument);
        }
        function.instructions().end();
        function
    }
}
