//! Writes the component around the merged module.
//!
//! Types, imports, exports and nested components are those of the skeleton,
//! byte for byte. What is made anew is the core side:
//!
//! ```text
//! tenant ──memory──► calls to the host ──► merged module ──► exports
//!                          │ allocate            │
//!                          ▼                     │
//!                     allocators ◄──elements─────┘
//! ```
//!
//! A call to the host may need an allocator, which is a function of the merged
//! module, which imports the call: the one circle that is left. It is broken
//! by a module of a few functions that call through a table, as wit-component
//! does for all calls.

use anyhow::{Context as _, Result, bail, ensure};
use wasm_encoder::{
    Alias, CanonicalFunctionSection, CanonicalOption, CodeSection, ComponentAliasSection,
    ComponentSection as _, ElementSection, ExportKind, ExportSection, Function, FunctionSection,
    InstanceSection, Module, ModuleArg, ModuleSection, RawSection, TableSection, TypeSection, ValType,
};
use wasmparser::{
    CanonicalFunction, ComponentAlias, ComponentAliasSectionReader, ComponentCanonicalSectionReader,
    ComponentImportSectionReader, ComponentTypeRef, FromReader as _, TypeRef,
};

use crate::TENANT;
use crate::emit::{ALLOCATORS, HOST, TABLE, allocator_table, emit};
use crate::graph::{Graph, Origin};
use crate::hollow::MEMORY;
use crate::link::Link;
use crate::sections::{PREAMBLE, Section, id};
use crate::split::append_single;

/// Core modules of the merged skeleton. The tenant is imported first.
mod module {
    pub(super) const TENANT: u32 = 0;
    pub(super) const ALLOCATORS: u32 = 1;
    pub(super) const MERGED: u32 = 2;
}

/// Core instances of the merged skeleton.
mod instance {
    pub(super) const TENANT: u32 = 0;
    pub(super) const ALLOCATORS: u32 = 1;
    pub(super) const HOST: u32 = 2;
    pub(super) const MERGED: u32 = 3;
}

/// The skeleton of `graph` with all its code in one module, which goes through
/// `optimize`.
pub(crate) fn assemble(
    graph: &Graph<'_>,
    optimize: impl FnOnce(Vec<u8>) -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let uses = Uses::find(graph)?;
    let mut link_roots = uses.exports.clone();
    link_roots.extend(&uses.allocators);
    let link = Link::new(graph, &link_roots)?;
    let imports = link.imports.iter().map(|function| function.index).collect();
    let merged = optimize(emit(link, &uses.exports, &uses.allocators, memory_minimum(graph))?)?;
    let mut writer = Writer {
        graph,
        uses,
        imports,
        component: PREAMBLE.to_vec(),
        functions: 0,
        host_functions: Vec::new(),
        skeleton_functions: 0,
        first_export: None,
        modules: 0,
        has_tenant: false,
    };
    for section in &graph.sections {
        writer.section(section, &merged)?;
    }
    ensure!(writer.has_tenant, "it imports no tenant");
    Ok(writer.component)
}

/// The least memory that all modules accept, which is what the skeleton
/// demands of a tenant.
fn memory_minimum(graph: &Graph<'_>) -> u64 {
    let imports = graph.modules.iter().flat_map(|module| &module.imported.memories);
    let minima = imports.map(|import| match import.ty {
        TypeRef::Memory(memory) => memory.initial,
        _ => 0,
    });
    minima.max().unwrap_or(0)
}

/// What the component's canonical definitions use of its core modules.
struct Uses<'a> {
    /// Functions that lifts and their options name.
    exports: Vec<Origin<'a>>,
    /// Allocators that calls to the host use.
    allocators: Vec<Origin<'a>>,
}

impl<'a> Uses<'a> {
    fn find(graph: &Graph<'a>) -> Result<Uses<'a>> {
        let mut uses = Uses { exports: Vec::new(), allocators: Vec::new() };
        let note = |list: &mut Vec<Origin<'a>>, function: u32| -> Result<()> {
            let origin = graph.function(function)?;
            if !list.contains(&origin) {
                list.push(origin);
            }
            Ok(())
        };
        for section in graph.sections.iter().filter(|section| section.id == id::CANONICAL) {
            for function in ComponentCanonicalSectionReader::new(section.reader())? {
                match function? {
                    CanonicalFunction::Lift { core_func_index, options, .. } => {
                        note(&mut uses.exports, core_func_index)?;
                        for option in &options {
                            use wasmparser::CanonicalOption::{PostReturn, Realloc};
                            if let Realloc(function) | PostReturn(function) = option {
                                note(&mut uses.exports, *function)?;
                            }
                        }
                    }
                    CanonicalFunction::Lower { options, .. } => {
                        for option in &options {
                            if let wasmparser::CanonicalOption::Realloc(function) = option {
                                note(&mut uses.allocators, *function)?;
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(uses)
    }
}

/// Writes the merged skeleton, section by section of the one it is made from.
struct Writer<'g, 'a> {
    graph: &'g Graph<'a>,
    uses: Uses<'a>,
    /// The functions that the merged module imports, as indices of the
    /// skeleton.
    imports: Vec<u32>,
    component: Vec<u8>,
    /// Number of core functions written.
    functions: u32,
    /// Functions of the host: index in the skeleton, index here.
    host_functions: Vec<(u32, u32)>,
    /// Number of core functions of the skeleton read.
    skeleton_functions: u32,
    /// Index of the first of the merged module's exports, once there is an
    /// instance of it.
    first_export: Option<u32>,
    /// Number of the skeleton's core modules read.
    modules: usize,
    /// Whether the import of the tenant was read.
    has_tenant: bool,
}

impl Writer<'_, '_> {
    fn section(&mut self, section: &Section<'_>, merged: &[u8]) -> Result<()> {
        match section.id {
            id::CUSTOM | id::CORE_INSTANCE => {}
            id::CORE_MODULE => self.modules += 1,
            id::IMPORT => {
                self.component.extend_from_slice(section.whole);
                for import in ComponentImportSectionReader::new(section.reader())? {
                    if let ComponentTypeRef::Module(_) = import?.ty {
                        let is_last = self.modules == self.graph.modules.len();
                        ensure!(is_last && !self.has_tenant, "it imports other modules than a tenant");
                        self.has_tenant = true;
                        self.start(merged);
                    }
                }
            }
            id::ALIAS => self.aliases(section)?,
            id::CANONICAL => {
                for function in ComponentCanonicalSectionReader::new(section.reader())? {
                    self.canonical(function?)?;
                }
            }
            _ => self.component.extend_from_slice(section.whole),
        }
        Ok(())
    }

    /// Behind the import of the tenant: the other modules, and the instances
    /// that need no call to the host.
    fn start(&mut self, merged: &[u8]) {
        let count = self.uses.allocators.len();
        ModuleSection(&allocators(count)).append_to_component(&mut self.component);
        RawSection { id: id::CORE_MODULE, data: merged }.append_to_component(&mut self.component);
        let mut instances = InstanceSection::new();
        instances.instantiate::<_, &str>(module::TENANT, []);
        instances.instantiate::<_, &str>(module::ALLOCATORS, []);
        instances.append_to_component(&mut self.component);
        let mut aliases = ComponentAliasSection::new();
        aliases.alias(export(instance::TENANT, ExportKind::Memory, MEMORY));
        for place in 0..count {
            aliases.alias(export(instance::ALLOCATORS, ExportKind::Func, &place.to_string()));
            self.functions += 1;
        }
        aliases.append_to_component(&mut self.component);
    }

    /// Copies all aliases but those of core instances, which are gone.
    fn aliases(&mut self, section: &Section<'_>) -> Result<()> {
        let count = ComponentAliasSectionReader::new(section.reader())?.count();
        let mut reader = section.reader();
        reader.read_var_u32()?;
        for _ in 0..count {
            let start = reader.original_position();
            let alias = ComponentAlias::from_reader(&mut reader)?;
            if let ComponentAlias::CoreInstanceExport { kind, .. } = alias {
                if kind == wasmparser::ExternalKind::Func {
                    self.skeleton_functions += 1;
                }
                continue;
            }
            let item =
                section.content.get(start..reader.original_position()).context("an alias without end")?;
            append_single(id::ALIAS, item, &mut self.component);
        }
        Ok(())
    }

    fn canonical(&mut self, function: CanonicalFunction) -> Result<()> {
        let mut section = CanonicalFunctionSection::new();
        match function {
            CanonicalFunction::Lift { core_func_index, type_index, options } => {
                let first = match self.first_export {
                    Some(first) => first,
                    None => self.instantiate()?,
                };
                let function = self.export(first, core_func_index)?;
                let options = self.options(&options, |writer, function| writer.export(first, function))?;
                section.lift(function, type_index, options);
                section.append_to_component(&mut self.component);
                return Ok(());
            }
            CanonicalFunction::Lower { func_index, options } => {
                let options = self.options(&options, Self::allocator)?;
                section.lower(func_index, options);
            }
            CanonicalFunction::ResourceDrop { resource } => {
                section.resource_drop(resource);
            }
            CanonicalFunction::ResourceNew { resource } => {
                section.resource_new(resource);
            }
            CanonicalFunction::ResourceRep { resource } => {
                section.resource_rep(resource);
            }
            other => bail!("a canonical definition that is not known here: {other:?}"),
        }
        ensure!(self.first_export.is_none(), "a call to the host is made after the first export");
        section.append_to_component(&mut self.component);
        self.host_functions.push((self.skeleton_functions, self.functions));
        self.skeleton_functions += 1;
        self.functions += 1;
        Ok(())
    }

    /// Instantiates the merged module. Returns the index of the first of its
    /// exports.
    fn instantiate(&mut self) -> Result<u32> {
        let items = self
            .imports
            .iter()
            .map(|import| {
                let known = self.host_functions.iter().find(|(skeleton, _)| skeleton == import);
                let (_, index) = known.context("a call to the host that comes too late")?;
                Ok((import.to_string(), ExportKind::Func, *index))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut instances = InstanceSection::new();
        instances.export_items(items);
        let arguments =
            [(TENANT, instance::TENANT), (ALLOCATORS, instance::ALLOCATORS), (HOST, instance::HOST)];
        let arguments = arguments.map(|(name, instance)| (name, ModuleArg::Instance(instance)));
        instances.instantiate(module::MERGED, arguments);
        instances.append_to_component(&mut self.component);
        let mut aliases = ComponentAliasSection::new();
        let first = self.functions;
        for place in 0..self.uses.exports.len() {
            aliases.alias(export(instance::MERGED, ExportKind::Func, &place.to_string()));
            self.functions += 1;
        }
        aliases.append_to_component(&mut self.component);
        self.first_export = Some(first);
        Ok(first)
    }

    /// The index here of the skeleton's core function `function`, which the
    /// merged module exports.
    fn export(&self, first: u32, function: u32) -> Result<u32> {
        Ok(first + place(&self.uses.exports, self.graph.function(function)?)?)
    }

    /// The index here of the skeleton's core function `function`, which is an
    /// allocator. Aliases of allocators are the first core functions.
    fn allocator(&self, function: u32) -> Result<u32> {
        place(&self.uses.allocators, self.graph.function(function)?)
    }

    /// Translates canonical options; `realloc` translates functions.
    fn options(
        &self,
        options: &[wasmparser::CanonicalOption],
        translate: impl Fn(&Self, u32) -> Result<u32>,
    ) -> Result<Vec<CanonicalOption>> {
        use wasmparser::CanonicalOption as Option;
        let translated = options.iter().map(|option| {
            Ok(match option {
                Option::UTF8 => CanonicalOption::UTF8,
                Option::UTF16 => CanonicalOption::UTF16,
                Option::CompactUTF16 => CanonicalOption::CompactUTF16,
                Option::Memory(memory) => {
                    let is_tenant = self.graph.memory(*memory)? == Origin::Tenant(MEMORY);
                    ensure!(is_tenant, "a call uses another memory");
                    CanonicalOption::Memory(0)
                }
                Option::Realloc(function) => CanonicalOption::Realloc(translate(self, *function)?),
                Option::PostReturn(function) => CanonicalOption::PostReturn(translate(self, *function)?),
                other => bail!("a canonical option that is not known here: {other:?}"),
            })
        });
        translated.collect()
    }
}

/// The place of `origin` in `list`.
fn place(list: &[Origin<'_>], origin: Origin<'_>) -> Result<u32> {
    let place = list.iter().position(|known| *known == origin).context("a function that is not there")?;
    Ok(u32::try_from(place)?)
}

fn export(instance: u32, kind: ExportKind, name: &str) -> Alias<'_> {
    Alias::CoreInstanceExport { instance, kind, name }
}

/// A module of `count` allocators, each of which calls what the merged module
/// puts into its slot of a table.
fn allocators(count: usize) -> Module {
    let mut types = TypeSection::new();
    types.ty().function([ValType::I32; 4], [ValType::I32]);
    let mut tables = TableSection::new();
    tables.table(allocator_table(count));
    let (mut functions, mut code) = (FunctionSection::new(), CodeSection::new());
    let mut exports = ExportSection::new();
    exports.export(TABLE, ExportKind::Table, 0);
    for (place, slot) in (0..count).zip(0..) {
        functions.function(0);
        exports.export(&place.to_string(), ExportKind::Func, slot);
        let mut function = Function::new([]);
        let mut body = function.instructions();
        for parameter in 0..4 {
            body.local_get(parameter);
        }
        body.i32_const(slot.cast_signed()).call_indirect(0, 0).end();
        code.function(&function);
    }
    let mut module = Module::new();
    module
        .section(&types)
        .section(&functions)
        .section(&tables)
        .section(&exports)
        .section(&ElementSection::new())
        .section(&code);
    module
}
