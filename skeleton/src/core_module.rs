//! A core module taken apart, as far as linking needs it.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail, ensure};
use wasmparser::{
    CompositeInnerType, DataSectionReader, Element, Encoding, Export, ExternalKind, FuncType, FunctionBody,
    Global, Import, KnownCustom, MemoryType, NameSectionReader, Parser, Payload, RecGroup, Table, TypeRef,
};

/// A core module. Bodies of functions are found but not read.
pub(crate) struct CoreModule<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) types: Vec<FuncType>,
    /// Imports by kind, each in its index space.
    pub(crate) imports: Vec<Import<'a>>,
    pub(crate) imported: Imported<'a>,
    /// Types of the functions that the module defines.
    pub(crate) functions: Vec<u32>,
    pub(crate) tables: Vec<Table<'a>>,
    pub(crate) memories: Vec<MemoryType>,
    pub(crate) globals: Vec<Global<'a>>,
    pub(crate) exports: HashMap<&'a str, Export<'a>>,
    pub(crate) has_start: bool,
    pub(crate) elements: Vec<Element<'a>>,
    pub(crate) bodies: Vec<FunctionBody<'a>>,
    pub(crate) data: Option<DataSectionReader<'a>>,
    pub(crate) names: Option<NameSectionReader<'a>>,
    /// Whether it was linked as a shared library.
    pub(crate) is_shared_library: bool,
}

/// Imports by kind: place `n` is the item with index `n`.
#[derive(Default)]
pub(crate) struct Imported<'a> {
    pub(crate) functions: Vec<Import<'a>>,
    pub(crate) tables: Vec<Import<'a>>,
    pub(crate) memories: Vec<Import<'a>>,
    pub(crate) globals: Vec<Import<'a>>,
}

impl<'a> CoreModule<'a> {
    /// Takes `bytes` apart.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<CoreModule<'a>> {
        let mut module = CoreModule {
            bytes,
            types: Vec::new(),
            imports: Vec::new(),
            imported: Imported::default(),
            functions: Vec::new(),
            tables: Vec::new(),
            memories: Vec::new(),
            globals: Vec::new(),
            exports: HashMap::new(),
            has_start: false,
            elements: Vec::new(),
            bodies: Vec::new(),
            data: None,
            names: None,
            is_shared_library: false,
        };
        for payload in Parser::new(0).parse_all(bytes) {
            module.take(payload?)?;
        }
        ensure!(module.functions.len() == module.bodies.len(), "functions without bodies");
        Ok(module)
    }

    fn take(&mut self, payload: Payload<'a>) -> Result<()> {
        match payload {
            Payload::Version { encoding, .. } => {
                ensure!(encoding == Encoding::Module, "a core module is none");
            }
            Payload::TypeSection(section) => {
                for group in section {
                    self.types.push(function_type(&group?)?);
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    self.import(import?)?;
                }
            }
            Payload::FunctionSection(section) => {
                self.functions = section.into_iter().collect::<Result<_, _>>()?
            }
            Payload::TableSection(section) => self.tables = section.into_iter().collect::<Result<_, _>>()?,
            Payload::MemorySection(section) => {
                self.memories = section.into_iter().collect::<Result<_, _>>()?
            }
            Payload::GlobalSection(section) => {
                self.globals = section.into_iter().collect::<Result<_, _>>()?
            }
            Payload::ExportSection(section) => {
                for export in section {
                    let export = export?;
                    ensure!(self.exports.insert(export.name, export).is_none(), "two exports of one name");
                }
            }
            Payload::StartSection { .. } => self.has_start = true,
            Payload::ElementSection(section) => {
                self.elements = section.into_iter().collect::<Result<_, _>>()?
            }
            Payload::CodeSectionEntry(body) => self.bodies.push(body),
            Payload::DataSection(section) => self.data = Some(section),
            Payload::CustomSection(section) => match section.as_known() {
                KnownCustom::Name(names) => self.names = Some(names),
                KnownCustom::Dylink0(_) => self.is_shared_library = true,
                _ => {}
            },
            Payload::DataCountSection { .. } | Payload::CodeSectionStart { .. } | Payload::End(_) => {}
            other => bail!("a section that is not known here: {other:?}"),
        }
        Ok(())
    }

    fn import(&mut self, import: Import<'a>) -> Result<()> {
        let of_kind = match import.ty {
            TypeRef::Func(_) => &mut self.imported.functions,
            TypeRef::Table(_) => &mut self.imported.tables,
            TypeRef::Memory(_) => &mut self.imported.memories,
            TypeRef::Global(_) => &mut self.imported.globals,
            TypeRef::Tag(_) | TypeRef::FuncExact(_) => bail!("an import of a kind that is not known here"),
        };
        of_kind.push(import);
        self.imports.push(import);
        Ok(())
    }

    /// The type of the function with index `function`.
    pub(crate) fn function_type(&self, function: u32) -> Result<&FuncType> {
        let index = function as usize;
        let type_index = match self.imported.functions.get(index) {
            Some(Import { ty: TypeRef::Func(type_index), .. }) => Some(*type_index),
            _ => self.functions.get(index.wrapping_sub(self.imported.functions.len())).copied(),
        };
        type_index
            .and_then(|type_index| self.types.get(type_index as usize))
            .context("a function without a type")
    }

    /// The imports of `kind`.
    pub(crate) fn imports_of(&self, kind: ExternalKind) -> Result<&[Import<'a>]> {
        match kind {
            ExternalKind::Func => Ok(&self.imported.functions),
            ExternalKind::Table => Ok(&self.imported.tables),
            ExternalKind::Memory => Ok(&self.imported.memories),
            ExternalKind::Global => Ok(&self.imported.globals),
            ExternalKind::Tag | ExternalKind::FuncExact => bail!("an item of a kind that is not known here"),
        }
    }
}

/// The one function type in `group`.
fn function_type(group: &RecGroup) -> Result<FuncType> {
    let mut types = group.types();
    match (types.next(), types.next()) {
        (Some(only), None) if only.is_final && only.supertype_idx.is_none() => {
            match &only.composite_type.inner {
                CompositeInnerType::Func(function) => Ok(function.clone()),
                _ => bail!("a type that is not a function's"),
            }
        }
        _ => bail!("types with subtypes"),
    }
}
