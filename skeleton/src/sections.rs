//! The sections of a component: what it consists of at its top level.

use anyhow::{Context as _, Result, ensure};
use wasmparser::BinaryReader;

/// Magic number, version and layer of a component.
pub(crate) const PREAMBLE: &[u8; 8] = b"\0asm\x0d\0\x01\0";

/// Section ids, as the component model's binary format has them.
pub(crate) mod id {
    pub(crate) const CUSTOM: u8 = 0;
    pub(crate) const CORE_MODULE: u8 = 1;
    pub(crate) const CORE_INSTANCE: u8 = 2;
    pub(crate) const CORE_TYPE: u8 = 3;
    pub(crate) const ALIAS: u8 = 6;
    pub(crate) const CANONICAL: u8 = 8;
    pub(crate) const IMPORT: u8 = 10;
}

/// One section.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section<'a> {
    /// What kind it is; see [`id`].
    pub(crate) id: u8,
    /// The section with its id and size.
    pub(crate) whole: &'a [u8],
    /// What is in it.
    pub(crate) content: &'a [u8],
}

impl<'a> Section<'a> {
    /// A reader for the content.
    pub(crate) fn reader(&self) -> BinaryReader<'a> {
        BinaryReader::new(self.content, 0)
    }
}

/// All sections of `component`, in order.
pub(crate) fn sections(component: &[u8]) -> Result<Vec<Section<'_>>> {
    ensure!(component.starts_with(PREAMBLE), "not a component");
    let mut reader = BinaryReader::new(component, 0);
    reader.read_bytes(PREAMBLE.len())?;
    let mut sections = Vec::new();
    while !reader.eof() {
        let start = reader.original_position();
        let id = reader.read_u8()?;
        let size = reader.read_var_u32()?;
        let content = reader.read_bytes(size as usize).context("the component is cut off")?;
        sections.push(Section { id, whole: &component[start..reader.original_position()], content });
    }
    Ok(sections)
}
