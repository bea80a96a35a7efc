//! Writes the merged module.

use anyhow::{Context as _, Result};
use wasm_encoder::reencode::{Error, Reencode, utils};
use wasm_encoder::{
    CodeSection, ConstExpr, ElementSection, Elements, EntityType, ExportKind, ExportSection, FunctionSection,
    GlobalSection, GlobalType, ImportSection, Instruction, MemoryType, Module, RefType, TableSection,
    TableType, TypeSection, ValType,
};
use wasmparser::{ElementItems, ElementKind, ExternalKind, Operator};

use crate::TENANT;
use crate::constants::evaluate;
use crate::graph::Origin;
use crate::hollow::MEMORY;
use crate::link::{GlobalUse, Link, Start};
use crate::names;

/// The merged module imports the host's functions from here, each under the
/// index that it has among the core functions of the skeleton.
pub(crate) const HOST: &str = "host";
/// It imports the table of allocators from here.
pub(crate) const ALLOCATORS: &str = "allocators";
/// Name of that table.
pub(crate) const TABLE: &str = "table";

/// The table of allocators is imported, so it comes before those defined.
const ALLOCATOR_TABLE: u32 = 0;

/// The merged module that `link` plans. It exports `exports`, each under its
/// place, and puts `allocators` into the imported table.
pub(crate) fn emit(
    mut link: Link<'_, '_>,
    exports: &[Origin<'_>],
    allocators: &[Origin<'_>],
    memory_minimum: u64,
) -> Result<Vec<u8>> {
    let mut views = Vec::new();
    for module in link.graph.order.clone() {
        views.push(View::new(&mut link, module)?);
    }
    // Written first: it needs the types, and the sections before it the rest.
    let (code, functions) = code(&link, &mut views)?;

    let mut types = TypeSection::new();
    for function in &link.types {
        types.ty().func_type(&function.clone().try_into().ok().context("a type that is not known here")?);
    }
    let mut imports = ImportSection::new();
    for function in &link.imports {
        imports.import(HOST, &function.index.to_string(), EntityType::Function(function.type_index));
    }
    imports.import(ALLOCATORS, TABLE, allocator_table(allocators.len()));
    imports.import(TENANT, MEMORY, tenant_memory(memory_minimum));
    for name in &link.start_values {
        imports.import(TENANT, name, GlobalType { val_type: ValType::I32, mutable: false, shared: false });
    }

    let mut merged = Module::new();
    merged
        .section(&types)
        .section(&imports)
        .section(&functions)
        .section(&tables(&link)?)
        .section(&globals(&link)?)
        .section(&export_section(&link, exports)?)
        .section(&element_section(&link, &views, allocators)?)
        .section(&code)
        .section(&names::merged(&link)?);
    Ok(merged.finish())
}

/// The type of the table of allocators.
pub(crate) fn allocator_table(allocators: usize) -> TableType {
    let size = allocators as u64;
    TableType {
        element_type: RefType::FUNCREF,
        minimum: size,
        maximum: Some(size),
        table64: false,
        shared: false,
    }
}

fn tenant_memory(minimum: u64) -> MemoryType {
    MemoryType { minimum, maximum: None, memory64: false, shared: false, page_size_log2: None }
}

fn code(link: &Link<'_, '_>, views: &mut [View]) -> Result<(CodeSection, FunctionSection)> {
    let (mut code, mut functions) = (CodeSection::new(), FunctionSection::new());
    for (module, index) in &link.functions {
        let source = &link.graph.modules[*module];
        let view = views.iter_mut().find(|view| view.module == *module).context("no view of a module")?;
        let place = (*index as usize).wrapping_sub(source.imported.functions.len());
        let body = source.bodies.get(place).context("a function without a body")?;
        let type_index = source.functions.get(place).context("a function without a type")?;
        functions.function(view.type_index(*type_index).map_err(described)?);
        view.parse_function_body(&mut code, body.clone()).map_err(described)?;
    }
    Ok((code, functions))
}

fn tables(link: &Link<'_, '_>) -> Result<TableSection> {
    let mut tables = TableSection::new();
    for (module, index) in &link.tables {
        let source = &link.graph.modules[*module];
        let table = source
            .tables
            .get((*index as usize).wrapping_sub(source.imported.tables.len()))
            .context("a table that is not there")?;
        let mut table_type =
            TableType::try_from(table.ty).ok().context("a table of a type that is not known here")?;
        if link.tables_are_fixed {
            table_type.maximum = Some(table_type.minimum);
        }
        tables.table(table_type);
    }
    Ok(tables)
}

fn globals(link: &Link<'_, '_>) -> Result<GlobalSection> {
    let mut globals = GlobalSection::new();
    for ((module, index), start) in &link.globals {
        let source = &link.graph.modules[*module];
        let global = source
            .globals
            .get((*index as usize).wrapping_sub(source.imported.globals.len()))
            .context("a global that is not there")?;
        let global_type =
            GlobalType::try_from(global.ty).ok().context("a global of a type that is not known here")?;
        let expression = match start {
            Start::Constant(value) => value.expression(),
            Start::OfTenant(index) => ConstExpr::global_get(*index),
        };
        globals.global(global_type, &expression);
    }
    Ok(globals)
}

fn export_section(link: &Link<'_, '_>, exports: &[Origin<'_>]) -> Result<ExportSection> {
    let mut section = ExportSection::new();
    for (place, export) in exports.iter().enumerate() {
        section.export(&place.to_string(), ExportKind::Func, link.function(*export)?);
    }
    Ok(section)
}

/// The elements of all modules. Those of the imported table come last: only
/// what is before them is put into the table when the code is compiled, and
/// not whenever an instance is made.
fn element_section(link: &Link<'_, '_>, views: &[View], allocators: &[Origin<'_>]) -> Result<ElementSection> {
    let mut section = ElementSection::new();
    for view in views {
        for element in &link.graph.modules[view.module].elements {
            let ElementItems::Functions(items) = &element.items else {
                anyhow::bail!("computed elements");
            };
            let functions = items
                .clone()
                .into_iter()
                .map(|function| view.function(function?).context("an element that is not there"))
                .collect::<Result<Vec<_>>>()?;
            let functions = Elements::Functions(functions.into());
            match &element.kind {
                ElementKind::Active { table_index, offset_expr } => {
                    let table = view.table(table_index.unwrap_or(0)).context("elements of no table")?;
                    let offset = evaluate(offset_expr, &mut |index| match view.global(index) {
                        Some(GlobalUse::Constant(value)) => Ok(Some(value)),
                        _ => Ok(None),
                    })?;
                    let offset = offset.context("elements at a place that is not known")?;
                    section.active(Some(table), &offset.expression(), functions);
                }
                ElementKind::Declared => {
                    section.declared(functions);
                }
                ElementKind::Passive => anyhow::bail!("passive elements"),
            }
        }
    }
    let functions =
        allocators.iter().map(|allocator| link.function(*allocator)).collect::<Result<Vec<_>>>()?;
    section.active(Some(ALLOCATOR_TABLE), &ConstExpr::i32_const(0), Elements::Functions(functions.into()));
    Ok(section)
}

/// One module's indices as indices of the merged module. Places are none
/// where no code that is written needs them.
struct View {
    module: usize,
    types: Vec<u32>,
    functions: Vec<Option<u32>>,
    globals: Vec<Option<GlobalUse>>,
    tables: Vec<Option<u32>>,
    first_element: u32,
}

impl View {
    fn new(link: &mut Link<'_, '_>, module: usize) -> Result<View> {
        let graph = link.graph;
        let code = &graph.modules[module];
        let types = code.types.iter().map(|function| link.add_type(function)).collect::<Result<Vec<_>>>()?;
        let functions = (0..u32::try_from(code.imported.functions.len() + code.bodies.len())?)
            .map(|index| {
                let origin = graph.in_module(module, ExternalKind::Func, index).ok()?;
                link.function(origin).ok()
            })
            .collect();
        let globals = (0..u32::try_from(code.imported.globals.len() + code.globals.len())?)
            .map(|index| link.global(module, index).ok())
            .collect();
        let tables = (0..u32::try_from(code.imported.tables.len() + code.tables.len())?)
            .map(|index| link.table(module, index).ok())
            .collect();
        Ok(View { module, types, functions, globals, tables, first_element: link.element(module, 0)? })
    }

    fn function(&self, index: u32) -> Option<u32> {
        self.functions.get(index as usize).copied().flatten()
    }

    fn global(&self, index: u32) -> Option<GlobalUse> {
        self.globals.get(index as usize).copied().flatten()
    }

    fn table(&self, index: u32) -> Option<u32> {
        self.tables.get(index as usize).copied().flatten()?.checked_add(ALLOCATOR_TABLE + 1)
    }
}

/// An index for which there is nothing in the merged module.
#[derive(Debug)]
struct Missing(&'static str, u32);

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "code uses {} {}, which is not there", self.0, self.1)
    }
}

impl std::error::Error for Missing {}

fn missing(what: &'static str, index: u32) -> impl FnOnce() -> Error<Missing> {
    move || Error::UserError(Missing(what, index))
}

fn described(error: Error<Missing>) -> anyhow::Error {
    anyhow::Error::from(error).context("failed to rewrite a function")
}

impl Reencode for View {
    type Error = Missing;

    fn type_index(&mut self, index: u32) -> Result<u32, Error<Missing>> {
        self.types.get(index as usize).copied().ok_or_else(missing("type", index))
    }

    fn function_index(&mut self, index: u32) -> Result<u32, Error<Missing>> {
        self.function(index).ok_or_else(missing("function", index))
    }

    fn global_index(&mut self, index: u32) -> Result<u32, Error<Missing>> {
        match self.global(index) {
            Some(GlobalUse::Index(index)) => Ok(index),
            _ => Err(missing("global", index)()),
        }
    }

    fn table_index(&mut self, index: u32) -> Result<u32, Error<Missing>> {
        self.table(index).ok_or_else(missing("table", index))
    }

    fn element_index(&mut self, index: u32) -> Result<u32, Error<Missing>> {
        self.first_element.checked_add(index).ok_or_else(missing("element segment", index))
    }

    fn instruction<'a>(&mut self, operator: Operator<'a>) -> Result<Instruction<'a>, Error<Missing>> {
        if let Operator::GlobalGet { global_index } = operator
            && let Some(GlobalUse::Constant(value)) = self.global(global_index)
        {
            return Ok(value.instruction());
        }
        utils::instruction(self, operator)
    }
}
