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
//! And an instruction that runs notes what it has seen in the cache behind it; a class
//! counts its first instances where it has the keys of all. So the code that requests run,
//! and the keys of the classes that they make instances of, are copied to one place. The
//! code that was copied stays, and whatever else refers to that runs the same.

use std::collections::HashMap;

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

/// The snapshot in a component.
pub struct Snapshot {
    component: Vec<u8>,
    memory: Memory,
}

impl Snapshot {
    /// Finds the snapshot in `component`.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn find(component: Vec<u8>) -> Result<Snapshot> {
        let memory = Memory::find(&component)?;
        Ok(Snapshot { component, memory })
    }

    /// The component, with the snapshot as it is now.
    pub fn into_component(self) -> Vec<u8> {
        self.component
    }

    /// Makes the objects at the addresses in `list` immortal.
    ///
    /// # Errors
    ///
    /// If there is no object at one of them.
    pub fn make_immortal(&mut self, list: &[u8]) -> Result<()> {
        for address in numbers(list)? {
            match self.number(address) {
                LEAST_IMMORTAL.. => {}
                references if COUNTS.contains(&references) => self.set(address, IMMORTAL)?,
                other => bail!("no object is at address {address}, which holds {other}"),
            }
        }
        Ok(())
    }

    /// Makes the instructions at the addresses in `list` load immortal constants. Before
    /// the addresses come three opcodes: see `CONSTANTS` in `image.py`.
    ///
    /// # Errors
    ///
    /// If there is no such instruction at one of them.
    pub fn borrow_constants(&mut self, list: &[u8]) -> Result<()> {
        let mut list = numbers(list)?;
        let mut opcode = || u8::try_from(list.next().unwrap_or(u32::MAX)).context("an opcode is missing");
        let (any, immortal, mortal) = (opcode()?, opcode()?, opcode()?);
        for address in list {
            let place = self.memory.place(address);
            match place.map(|place| &mut self.component[place]) {
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
    pub fn renew_code(&mut self, list: &[u8]) -> Result<()> {
        let mut list = numbers(list)?;
        let current = self.number(list.next().context("the list of versions is empty")?);
        for address in list {
            self.set(address, current)?;
        }
        Ok(())
    }

    /// Copies what requests write to, and nothing allocates, to where it lies together:
    /// see `CODE`, `KEYS` and `ROOM` in `image.py`. Last of all, so that the copies have
    /// what was done to the originals.
    ///
    /// # Errors
    ///
    /// If the lists are not about what is there.
    pub fn gather(&mut self, code: &[u8], keys: &[u8], room: &[u8]) -> Result<()> {
        let room: Vec<_> = numbers(room)?.collect();
        let [start, length] = room[..] else { bail!("where there is room is two numbers") };
        let end = start.checked_add(length).context("there is no such room")?;
        let mut room = Room { next: start.next_multiple_of(ALIGNMENT), end };
        self.gather_code(code, &mut room).context("failed to move code")?;
        self.gather_keys(keys, &mut room).context("failed to move keys")
    }

    fn gather_code(&mut self, list: &[u8], room: &mut Room) -> Result<()> {
        let list: Vec<_> = numbers(list)?.collect();
        let (count, rest) = list.split_first().context("the list is empty")?;
        let (code, pointers) =
            rest.as_chunks::<2>().0.split_at_checked(*count as usize).context("the list is cut off")?;
        let mut moved = Vec::new();
        for &[source, length] in code {
            moved.push((source, self.copy(source, length, room)?));
        }
        for &[pointer, number] in pointers {
            let (source, target) = moved.get(number as usize).context("a pointer is to no code")?;
            ensure!(self.number(pointer) == *source, "no pointer to code is at address {pointer}");
            self.set(pointer, *target)?;
        }
        Ok(())
    }

    /// The keys of a class count how many instances there were, and who has a dictionary.
    fn gather_keys(&mut self, list: &[u8], room: &mut Room) -> Result<()> {
        let list: Vec<_> = numbers(list)?.collect();
        let (count, rest) = list.split_first().context("the list is empty")?;
        let (classes, dictionaries) =
            rest.split_at_checked(*count as usize).context("the list is cut off")?;
        let mut moved = HashMap::new();
        for &pointer in classes {
            let source = self.number(pointer);
            // Some classes have none.
            if source == 0 {
                continue;
            }
            let target = self.copy(source, self.size_of_keys(source)?, room)?;
            self.set(pointer, target)?;
            moved.insert(source, target);
        }
        for &pointer in dictionaries {
            if let Some(target) = moved.get(&self.number(pointer)) {
                self.set(pointer, *target)?;
            }
        }
        Ok(())
    }

    /// The bytes of the keys at `address` (CPython 3.14, `pycore_dict.h`, `_dictkeysobject`).
    fn size_of_keys(&self, address: u32) -> Result<u32> {
        let at = |offset| self.number(address.saturating_add(offset));
        let [log2_entries, log2_indices, kind, _] = at(4).to_le_bytes();
        let (usable, used) = (at(12), at(16));
        // `DICT_KEYS_SPLIT`, and `SHARED_KEYS_MAX_SIZE` in a table for some more.
        let are_shared = kind == 2 && (log2_entries, log2_indices) == (6, 6);
        ensure!(are_shared && usable <= 30 && used <= 30, "no keys of a class are at address {address}");
        let entries = (2 << log2_entries) / 3;
        Ok(20 + (1 << log2_indices) + 8 * entries)
    }

    /// Copies `length` bytes from `source` to the next free place in `room`, and returns where it is.
    fn copy(&mut self, source: u32, length: u32, room: &mut Room) -> Result<u32> {
        let target = room.take(length).context("there is too little room")?;
        for offset in 0..length {
            let byte = self.memory.place(source.saturating_add(offset));
            let byte = byte.map_or(0, |place| self.component[place]);
            let place = self.memory.place(target + offset).context("the room is not in the snapshot")?;
            self.component[place] = byte;
        }
        Ok(target)
    }

    /// The four bytes at `address`.
    fn number(&self, address: u32) -> u32 {
        let bytes = self.memory.places(address).map(|place| place.map_or(0, |place| self.component[place]));
        u32::from_le_bytes(bytes)
    }

    /// Replaces the four bytes at `address`.
    ///
    /// Zeros that begin or end a piece are left out of it. Those that end one are more
    /// than there are in a word, so a last byte that is not zero has its place.
    fn set(&mut self, address: u32, number: u32) -> Result<()> {
        for (place, byte) in self.memory.places(address).into_iter().zip(number.to_le_bytes()) {
            match place {
                Some(place) => self.component[place] = byte,
                None => ensure!(byte == 0, "a part of what is at address {address} is not in the snapshot"),
            }
        }
        Ok(())
    }
}

/// Memory that nobody uses.
struct Room {
    next: u32,
    end: u32,
}

impl Room {
    /// The address of `length` bytes of it, if there are as many.
    fn take(&mut self, length: u32) -> Option<u32> {
        let address = self.next;
        let end = address.checked_add(length).filter(|end| *end <= self.end)?;
        self.next = end.checked_next_multiple_of(ALIGNMENT)?;
        Some(address)
    }
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

    fn snapshot(pieces: &[(i32, &[u8])]) -> Snapshot {
        Snapshot::find(component(pieces)).unwrap()
    }

    fn made_immortal(pieces: &[(i32, &[u8])], addresses: &[u32]) -> Result<Vec<u8>> {
        let mut snapshot = snapshot(pieces);
        snapshot.make_immortal(&list(addresses))?;
        Ok(snapshot.into_component())
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
        let told = [2, 0x110, 5, 0x118, 3, 0x200, 1, 0x204, 0];
        let gather = |told: &[u32], room: &[u32]| {
            let mut patched = snapshot(&pieces);
            patched.gather(&list(told), &list(&[0]), &list(room))?;
            anyhow::Ok(patched.into_component())
        };
        let mut moved = room;
        moved[..5].copy_from_slice(&code[..5]);
        moved[16..19].copy_from_slice(&code[8..]);
        let after = [0x10, 3, 0, 0, 0, 3];
        let expected = component(&[(0x110, &code), (0x200, &after), (0x300, &moved)]);
        assert_eq!(gather(&told, &[0x2f1, 0x22]).unwrap(), expected);
        // Too little room, and none.
        for room in [&[0x2f1, 0x21][..], &[0x310, 0x20], &[0xffff_fff0, 0x20], &[0x300], &[]] {
            assert!(gather(&told, room).is_err(), "{room:x?}");
        }
        // No pointer to it, no code of that number, and fewer than there should be.
        let bad = [
            [2, 0x110, 5, 0x118, 3, 0x201, 1, 0x204, 0],
            [2, 0x110, 5, 0x118, 3, 0x200, 2, 0x204, 0],
            [9, 0x110, 5, 0x118, 3, 0x200, 1, 0x204, 0],
        ];
        for told in bad {
            assert!(gather(&told, &[0x300, 0x18]).is_err(), "{told:x?}");
        }
        assert!(gather(&[], &[0x300, 0x18]).is_err());
    }

    #[test]
    fn keys_are_copied_with_all_that_share_them() {
        let mut keys = [0xee; 20 + 64 + 8 * 42];
        // References, sizes and kind, version, how many can come, how many there are.
        for (place, number) in [(0, 2), (4, 0x0002_0606), (8, 77), (12, 21), (16, 3)] {
            keys[place..][..4].copy_from_slice(&u32::to_le_bytes(number));
        }
        let other = [0xff; 512];
        // Two classes, one of them without keys; a dictionary with those of the class, and another one.
        let pointers = |keys: u32| [keys, 0, keys, 0x1234].map(u32::to_le_bytes).concat();
        let gather = |keys: &[u8], told: &[u32]| {
            let (pointers, mut after) = (pointers(0x1004), other);
            let pieces: [(i32, &[u8]); 3] = [(0x1004, keys), (0x2000, &pointers), (0x3000, &other)];
            let mut patched = snapshot(&pieces);
            patched.gather(&list(&[0]), &list(told), &list(&[0x3000, 512]))?;
            after[..keys.len()].copy_from_slice(keys);
            anyhow::Ok((patched.into_component(), after))
        };
        let told = [2, 0x2000, 0x2004, 0x2008, 0x200c];
        let (patched, after) = gather(&keys, &told).unwrap();
        let moved = pointers(0x3000);
        assert_eq!(patched, component(&[(0x1004, &keys), (0x2000, &moved), (0x3000, &after)]));
        // Dictionaries of another kind, and numbers that can not be.
        for (place, byte) in [(6, 1), (4, 5), (5, 30), (12, 31), (19, 1)] {
            let mut bad = keys;
            bad[place] = byte;
            assert!(gather(&bad, &told).is_err(), "{place}");
        }
        for told in [&[5, 0x2000, 0x2004][..], &[1, 0x200c], &[]] {
            assert!(gather(&keys, told).is_err(), "{told:x?}");
        }
    }

    #[test]
    fn versions_become_the_current_one() {
        let pieces: [(i32, &[u8]); 1] = [(16, &[7, 1, 0, 0, 9, 2, 0, 0, 9, 9])];
        let mut patched = snapshot(&pieces);
        patched.renew_code(&list(&[16, 20])).unwrap();
        assert!(patched.renew_code(&list(&[16, 99])).is_err());
        assert!(patched.renew_code(&[]).is_err());
        assert_eq!(patched.into_component(), component(&[(16, &[7, 1, 0, 0, 7, 1, 0, 0, 9, 9])]));
    }

    #[test]
    fn instructions_that_load_constants_are_replaced() {
        let memory: [(i32, &[u8]); 1] = [(16, &[82, 1, 191, 2, 190, 3, 9, 82])];
        let mut patched = snapshot(&memory);
        patched.borrow_constants(&list(&[82, 190, 191, 16, 18, 20])).unwrap();
        for bad in [&[82, 190, 191, 22][..], &[82, 190, 191, 15], &[82, 190], &[82, 190, 256]] {
            assert!(patched.borrow_constants(&list(bad)).is_err(), "{bad:?}");
        }
        assert!(patched.borrow_constants(&[1, 2, 3]).is_err());
        assert_eq!(patched.into_component(), component(&[(16, &[190, 1, 190, 2, 190, 3, 9, 82])]));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        let memory: [(i32, &[u8]); 1] = [(16, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0x3f, 1])];
        for address in [0, 20, 24, 1 << 20, u32::MAX] {
            assert!(made_immortal(&memory, &[address]).is_err(), "{address}");
        }
        assert!(Snapshot::find(component(&[])).is_err());
        assert!(snapshot(&memory).make_immortal(&[1, 2, 3]).is_err());
    }
}
