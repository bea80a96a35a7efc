//! Patches the snapshot, so that requests write to less of it. What there is to do is
//! told by the adapter's `image.py`, which sees to it that all of it stays.
//!
//! CPython counts references in the objects themselves, so an instance that
//! merely looks at an object of the snapshot writes to it, and gets a copy of
//! its page. It does not count those of immortal objects (PEP 683), which have a
//! count that is out of the ordinary. A guest can not set its objects' counts;
//! the snapshot is a file, where we can.
//!
//! An instruction that loads a constant becomes, when it first runs, one for immortal
//! or one for mortal constants, which counts without a look (CPython 3.14,
//! `bytecodes.c`, `LOAD_CONST`). When the build ran, none was immortal.
//!
//! And an instruction that runs notes what it has seen in the cache behind it. So the
//! code that requests run is copied to one place. What it was copied from stays, and
//! whatever else refers to that runs the same.

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
/// Objects' addresses are multiples of it.
const ALIGNMENT: u32 = 16;

/// Makes the objects at `addresses`, each of four bytes in the guest's memory,
/// immortal in the snapshot that is in `component`.
///
/// # Errors
///
/// If there is no object at one of them.
pub fn make_immortal(component: &mut [u8], addresses: &[u8]) -> Result<()> {
    let memory = Memory::find(component)?;
    for address in numbers(addresses)? {
        match u32::from_le_bytes(memory.word(component, address)) {
            LEAST_IMMORTAL.. => {}
            references if COUNTS.contains(&references) => {
                memory.set_word(component, address, IMMORTAL.to_le_bytes())?;
            }
            other => bail!("no object is at address {address}, which holds {other}"),
        }
    }
    Ok(())
}

/// Makes the instructions at the addresses in `list`, each of four bytes, load immortal
/// constants. Before the addresses come three opcodes: see `CONSTANTS` in `image.py`.
///
/// # Errors
///
/// If there is no such instruction at one of them.
pub fn borrow_constants(component: &mut [u8], list: &[u8]) -> Result<()> {
    let memory = Memory::find(component)?;
    let mut list = numbers(list)?;
    let mut opcode = || u8::try_from(list.next().unwrap_or(u32::MAX)).context("an opcode is missing");
    let (any, immortal, mortal) = (opcode()?, opcode()?, opcode()?);
    for address in list {
        let place = memory.place(address);
        match place.map(|place| &mut component[place]) {
            Some(byte) if [any, immortal, mortal].contains(byte) => *byte = immortal,
            _ => bail!("no instruction that loads a constant is at address {address}"),
        }
    }
    Ok(())
}

/// Makes code as new as the interpreter's events: see `VERSIONS` in `image.py`.
///
/// # Errors
///
/// If there are no versions.
pub fn renew_code(component: &mut [u8], list: &[u8]) -> Result<()> {
    let memory = Memory::find(component)?;
    let mut list = numbers(list)?;
    let current = memory.word(component, list.next().context("the list of versions is empty")?);
    for address in list {
        memory.set_word(component, address, current)?;
    }
    Ok(())
}

/// Copies code to where it lies together, as `list` tells: see `CODE` in `image.py`. Last
/// of all, so that the copies have what was done to the code.
///
/// # Errors
///
/// If `list` is not about what is there.
pub fn gather_code(component: &mut [u8], list: &[u8]) -> Result<()> {
    let memory = Memory::find(component)?;
    let list: Vec<_> = numbers(list)?.collect();
    let (Some((count, rest)), Some(mut target)) = (list.split_first(), list.last().copied()) else {
        bail!("the list of code is empty");
    };
    let (code, rest) = rest.as_chunks::<2>().0.split_at_checked(*count as usize).context("it is cut off")?;
    let mut moved = Vec::new();
    for &[source, length] in code {
        moved.push((source, target));
        for offset in 0..length {
            let byte = memory.place(source.saturating_add(offset)).map_or(0, |place| component[place]);
            let place = memory.place(target.saturating_add(offset)).context("there is no room for code")?;
            component[place] = byte;
        }
        target = target.saturating_add(length).next_multiple_of(ALIGNMENT);
    }
    for &[pointer, number] in rest {
        let (source, target) = moved.get(number as usize).context("a pointer is to no code")?;
        let found = memory.word(component, pointer);
        ensure!(found == source.to_le_bytes(), "no pointer to code is at address {pointer}");
        memory.set_word(component, pointer, target.to_le_bytes())?;
    }
    Ok(())
}

/// The numbers in a file of the guest.
fn numbers(bytes: &[u8]) -> Result<impl Iterator<Item = u32>> {
    let (numbers, rest) = bytes.as_chunks::<4>();
    ensure!(rest.is_empty(), "a list of the guest is cut off");
    Ok(numbers.iter().map(|number| u32::from_le_bytes(*number)))
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

    /// The places of the four bytes at `address`.
    fn places(&self, address: u32) -> [Option<usize>; 4] {
        [0, 1, 2, 3].map(|byte| self.place(address.checked_add(byte)?))
    }

    /// The four bytes at `address`.
    fn word(&self, component: &[u8], address: u32) -> [u8; 4] {
        self.places(address).map(|place| place.map_or(0, |place| component[place]))
    }

    /// Replaces the four bytes at `address`.
    ///
    /// Zeros that begin or end a piece are left out of it. Those that end one are more
    /// than there are in a word, so a last byte that is not zero has its place.
    fn set_word(&self, component: &mut [u8], address: u32, word: [u8; 4]) -> Result<()> {
        for (place, byte) in self.places(address).into_iter().zip(word) {
            match place {
                Some(place) => component[place] = byte,
                None => ensure!(byte == 0, "a part of what is at address {address} is not in the snapshot"),
            }
        }
        Ok(())
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

    /// A file of the guest with these numbers.
    fn list(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    fn made_immortal(pieces: &[(i32, &[u8])], addresses: &[u32]) -> Result<Vec<u8>> {
        let mut component = component(pieces);
        make_immortal(&mut component, &list(addresses))?;
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
    fn code_is_copied_and_pointers_follow() {
        let room = [0xff; 24];
        // Code of 5 and 3 bytes, and pointers to the second one and to the first.
        let code = [1, 2, 0, 4, 5, 0, 0, 0, 6, 7, 8];
        let pointers = [0x18, 1, 0, 0, 0x10, 1];
        let pieces: [(i32, &[u8]); 3] = [(0x110, &code), (0x200, &pointers), (0x300, &room)];
        let told = [2, 0x110, 5, 0x118, 3, 0x200, 1, 0x204, 0, 0x300];
        let mut patched = component(&pieces);
        gather_code(&mut patched, &list(&told)).unwrap();
        let mut moved = room;
        moved[..5].copy_from_slice(&code[..5]);
        moved[16..19].copy_from_slice(&code[8..]);
        let after = [0x10, 3, 0, 0, 0, 3];
        assert_eq!(patched, component(&[(0x110, &code), (0x200, &after), (0x300, &moved)]));
        // Neither room for it, nor a pointer to it, nor code of that number.
        let bad = [
            [2, 0x110, 5, 0x118, 3, 0x200, 1, 0x204, 0, 0x310],
            [2, 0x110, 5, 0x118, 3, 0x201, 1, 0x204, 0, 0x300],
            [2, 0x110, 5, 0x118, 3, 0x200, 2, 0x204, 0, 0x300],
            [9, 0x110, 5, 0x118, 3, 0x200, 1, 0x204, 0, 0x300],
        ];
        for told in bad {
            assert!(gather_code(&mut component(&pieces), &list(&told)).is_err(), "{told:x?}");
        }
        assert!(gather_code(&mut component(&pieces), &[]).is_err());
    }

    #[test]
    fn versions_become_the_current_one() {
        let pieces: [(i32, &[u8]); 1] = [(16, &[7, 1, 0, 0, 9, 2, 0, 0, 9, 9])];
        let mut patched = component(&pieces);
        renew_code(&mut patched, &list(&[16, 20])).unwrap();
        assert_eq!(patched, component(&[(16, &[7, 1, 0, 0, 7, 1, 0, 0, 9, 9])]));
        assert!(renew_code(&mut patched, &list(&[16, 99])).is_err());
        assert!(renew_code(&mut patched, &[]).is_err());
    }

    #[test]
    fn instructions_that_load_constants_are_replaced() {
        let memory: [(i32, &[u8]); 1] = [(16, &[82, 1, 191, 2, 190, 3, 9, 82])];
        let mut patched = component(&memory);
        borrow_constants(&mut patched, &list(&[82, 190, 191, 16, 18, 20])).unwrap();
        assert_eq!(patched, component(&[(16, &[190, 1, 190, 2, 190, 3, 9, 82])]));
        for bad in [&[82, 190, 191, 22][..], &[82, 190, 191, 15], &[82, 190], &[82, 190, 256]] {
            assert!(borrow_constants(&mut patched, &list(bad)).is_err(), "{bad:?}");
        }
        assert!(borrow_constants(&mut patched, &[1, 2, 3]).is_err());
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
