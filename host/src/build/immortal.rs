//! Makes the objects of a snapshot immortal.
//!
//! CPython counts references in the objects themselves, so an instance that
//! merely looks at an object of the snapshot writes to it, and gets a copy of
//! its page. It does not count those of immortal objects (PEP 683), which have a
//! count that is out of the ordinary. A guest can not set its objects' counts;
//! the snapshot is a file, where we can. See the adapter's `image.py`, which
//! tells which objects there are and sees to it that they stay.

use anyhow::{Context as _, Result, bail, ensure};
use wasmparser::{DataKind, Operator, Parser, Payload};

/// The count of an immortal object where pointers have 32 bits: CPython 3.14,
/// `refcount.h`, `_Py_IMMORTAL_INITIAL_REFCNT`.
const IMMORTAL: u32 = 5 << 28;
/// Counts from here on are those of immortal objects already
/// (`_Py_IMMORTAL_MINIMUM_REFCNT`).
const LEAST_IMMORTAL: u32 = 4 << 28;
/// No object that can be found has fewer references, and none has so many.
const COUNTS: std::ops::Range<u32> = 1..1 << 24;

/// Makes the objects at `addresses`, each of four bytes in the guest's memory,
/// immortal in the snapshot that is in `component`.
///
/// # Errors
///
/// If there is no object at one of them.
pub fn make_immortal(component: &mut [u8], addresses: &[u8]) -> Result<()> {
    let memory = Memory::find(component)?;
    let (addresses, rest) = addresses.as_chunks::<4>();
    ensure!(rest.is_empty(), "the list of objects is cut off");
    for address in addresses {
        let address = u32::from_le_bytes(*address);
        let places = [0, 1, 2, 3].map(|byte| memory.place(address.checked_add(byte)?));
        let byte = |place: Option<usize>| place.map_or(0, |place| component[place]);
        match u32::from_le_bytes(places.map(byte)) {
            LEAST_IMMORTAL.. => continue,
            references if COUNTS.contains(&references) => {}
            other => bail!("no object is at address {address}, which holds {other}"),
        }
        // Zeros that begin or end a piece are left out of it. Those that end
        // one are more than there are in a count, so its last byte is there.
        for (place, byte) in places.into_iter().zip(IMMORTAL.to_le_bytes()) {
            match place {
                Some(place) => component[place] = byte,
                None => {
                    ensure!(byte == 0, "a part of the object at address {address} is not in the snapshot")
                }
            }
        }
    }
    Ok(())
}

/// Where the guest's memory is in a component: pieces, by their addresses.
struct Memory(Vec<Piece>);

struct Piece {
    address: u32,
    length: usize,
    /// Place of its first byte in the component.
    place: usize,
}

impl Memory {
    fn find(component: &[u8]) -> Result<Memory> {
        let mut pieces = Vec::new();
        for section in crate::artifact::sections(component) {
            let section = section.context("the component is cut off")?;
            // Section 1 of a component is a core module.
            if section.id != 1 || !pieces.is_empty() {
                continue;
            }
            let module = &component[section.content.clone()];
            for payload in Parser::new(0).parse_all(module) {
                let Payload::DataSection(data) = payload? else { continue };
                for segment in data {
                    let segment = segment?;
                    let DataKind::Active { memory_index: 0, offset_expr } = segment.kind else { continue };
                    let Operator::I32Const { value } = offset_expr.get_operators_reader().read()? else {
                        bail!("a part of the memory has no fixed place");
                    };
                    pieces.push(Piece {
                        address: value.cast_unsigned(),
                        length: segment.data.len(),
                        place: section.content.start + segment.range.end - segment.data.len(),
                    });
                }
            }
        }
        ensure!(!pieces.is_empty(), "there is no memory");
        pieces.sort_by_key(|piece| piece.address);
        Ok(Memory(pieces))
    }

    /// The place in the component of the byte at `address`, if it is not zero.
    fn place(&self, address: u32) -> Option<usize> {
        let after = self.0.partition_point(|piece| piece.address <= address);
        let piece = self.0.get(after.checked_sub(1)?)?;
        let offset = (address - piece.address) as usize;
        (offset < piece.length).then_some(piece.place + offset)
    }
}

#[cfg(test)]
mod tests {
    use wasm_encoder::{Component, ConstExpr, DataSection, MemorySection, MemoryType, Module, ModuleSection};

    use super::*;

    /// A component with these pieces of memory.
    fn component(pieces: &[(i32, &[u8])]) -> Vec<u8> {
        let mut memories = MemorySection::new();
        memories.memory(MemoryType {
            minimum: 1,
            maximum: None,
            memory64: false,
            shared: false,
            page_size_log2: None,
        });
        let mut data = DataSection::new();
        for (address, bytes) in pieces {
            data.active(0, &ConstExpr::i32_const(*address), bytes.iter().copied());
        }
        let mut module = Module::new();
        module.section(&memories).section(&data);
        let mut component = Component::new();
        component.section(&ModuleSection(&module));
        component.finish()
    }

    fn made_immortal(pieces: &[(i32, &[u8])], addresses: &[u32]) -> Result<Vec<u8>> {
        let mut component = component(pieces);
        let addresses: Vec<u8> = addresses.iter().flat_map(|address| address.to_le_bytes()).collect();
        make_immortal(&mut component, &addresses)?;
        Ok(component)
    }

    #[test]
    fn counts_are_replaced_and_nothing_else() {
        let before: [(i32, &[u8]); 2] = [(16, &[9, 2, 0, 0, 0, 7, 7, 7]), (64, &[1, 0, 0, 5])];
        let after: [(i32, &[u8]); 2] = [(16, &[9, 0, 0, 0, 0x50, 7, 7, 7]), (64, &[1, 0, 0, 0x50])];
        // The count at 63 is 256: its first byte is one of the zeros before a piece.
        assert_eq!(made_immortal(&before[..1], &[17]).unwrap(), component(&after[..1]));
        let split: [(i32, &[u8]); 1] = [(64, &[1, 0, 0, 5])];
        assert_eq!(made_immortal(&split, &[63]).unwrap(), component(&[(64, &[0, 0, 0x50, 5])]));
        // One that is immortal already stays as it is.
        let other: [(i32, &[u8]); 1] = [(3, &[0x70])];
        assert_eq!(made_immortal(&other, &[0]).unwrap(), component(&other));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        let memory: [(i32, &[u8]); 1] = [(16, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0x3f, 1])];
        for address in [0, 20, 24, 1 << 20, u32::MAX] {
            assert!(made_immortal(&memory, &[address]).is_err(), "{address}");
        }
        assert!(made_immortal(&[], &[]).is_err());
        let mut truncated = component(&memory);
        assert!(make_immortal(&mut truncated, &[1, 2, 3]).is_err());
    }
}
