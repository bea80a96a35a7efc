//! Decides what goes into the merged module, and under which index.
//!
//! The merged module has the functions that can be reached, and the globals
//! that change. A global that nothing writes, and whose value is known, is a
//! constant wherever it is read: the addresses that one library takes from
//! another are such globals.

use std::collections::{HashMap, HashSet};

use anyhow::{Context as _, Result, bail, ensure};
use wasmparser::{ElementItems, ElementKind, ExternalKind, FuncType, Operator, TableInit};

use crate::constants::{Constant, evaluate};
use crate::core_module::CoreModule;
use crate::graph::{Graph, Origin};
use crate::hollow::MEMORY;

/// An item of one module: the module's place in [`Graph::modules`], and the
/// item's index there.
pub(crate) type InModule = (usize, u32);

/// The plan of the merged module.
pub(crate) struct Link<'g, 'a> {
    pub(crate) graph: &'g Graph<'a>,
    /// The types of all functions.
    pub(crate) types: Vec<FuncType>,
    type_indices: HashMap<FuncType, u32>,
    /// Functions imported from the host: indices in the component.
    pub(crate) imports: Vec<HostFunction<'a>>,
    import_indices: HashMap<u32, u32>,
    /// Functions to be written, in order, behind the imports.
    pub(crate) functions: Vec<InModule>,
    function_indices: HashMap<InModule, u32>,
    /// Names of the tenant's start values, imported as the first globals.
    pub(crate) start_values: Vec<&'a str>,
    /// Globals to be written, in order, behind the start values.
    pub(crate) globals: Vec<(InModule, Start)>,
    global_indices: HashMap<InModule, GlobalUse>,
    /// Tables to be written. None stands before them.
    pub(crate) tables: Vec<InModule>,
    table_indices: HashMap<InModule, u32>,
    /// For each module the index of its first element segment.
    element_bases: HashMap<usize, u32>,
    /// Whether no code makes a table larger.
    pub(crate) tables_are_fixed: bool,
}

/// A function that a canonical definition makes.
pub(crate) struct HostFunction<'a> {
    /// Its index among the core functions of the skeleton.
    pub(crate) index: u32,
    /// Its type in the merged module.
    pub(crate) type_index: u32,
    /// The name under which a module imports it.
    pub(crate) name: &'a str,
}

/// What a global starts with.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    /// With a number.
    Constant(Constant),
    /// With the tenant's start value of this index.
    OfTenant(u32),
}

/// What stands for a module's global in the merged module.
#[derive(Clone, Copy)]
pub(crate) enum GlobalUse {
    /// The global with this index.
    Index(u32),
    /// A number.
    Constant(Constant),
}

impl<'g, 'a> Link<'g, 'a> {
    /// Plans the merged module, with all that `roots` need.
    pub(crate) fn new(graph: &'g Graph<'a>, roots: &[Origin<'a>]) -> Result<Link<'g, 'a>> {
        let mut link = Link {
            graph,
            types: Vec::new(),
            type_indices: HashMap::new(),
            imports: Vec::new(),
            import_indices: HashMap::new(),
            functions: Vec::new(),
            function_indices: HashMap::new(),
            start_values: Vec::new(),
            globals: Vec::new(),
            global_indices: HashMap::new(),
            tables: Vec::new(),
            table_indices: HashMap::new(),
            element_bases: HashMap::new(),
            tables_are_fixed: true,
        };
        let mut elements = 0;
        for index in &graph.order {
            let module = &graph.modules[*index];
            check(module).with_context(|| format!("module {index} can not be merged"))?;
            link.element_bases.insert(*index, elements);
            elements += u32::try_from(module.elements.len())?;
            for table in (0u32..).take(module.tables.len()) {
                let table_index = table + u32::try_from(module.imported.tables.len())?;
                let merged = u32::try_from(link.tables.len())?;
                link.table_indices.insert((*index, table_index), merged);
                link.tables.push((*index, table_index));
            }
            for memory in (0u32..).take(module.imported.memories.len()) {
                let origin = graph.in_module(*index, ExternalKind::Memory, memory)?;
                ensure!(origin == Origin::Tenant(MEMORY), "module {index} uses a memory of its own");
            }
        }
        let reached = Reached::from(graph, roots)?;
        link.tables_are_fixed = !reached.grows_tables;
        link.add_functions(&reached)?;
        link.add_globals(&reached)?;
        Ok(link)
    }

    /// Gives indices to the reached functions, in the modules' own order.
    fn add_functions(&mut self, reached: &Reached) -> Result<()> {
        let mut host = reached.host.iter().map(|(index, user)| (*index, *user)).collect::<Vec<_>>();
        host.sort_unstable();
        for (index, (module, import_index)) in host {
            let code = &self.graph.modules[module];
            let type_index = self.add_type(code.function_type(import_index)?)?;
            let name = code.imported.functions.get(import_index as usize).map_or("", |import| import.name);
            self.import_indices.insert(index, u32::try_from(self.imports.len())?);
            self.imports.push(HostFunction { index, type_index, name });
        }
        for module in &self.graph.order {
            let code = &self.graph.modules[*module];
            let first = code.imported.functions.len();
            for index in first..first + code.bodies.len() {
                let function = (*module, u32::try_from(index)?);
                if reached.functions.contains(&function) {
                    let merged = u32::try_from(self.imports.len() + self.functions.len())?;
                    self.function_indices.insert(function, merged);
                    self.functions.push(function);
                }
            }
        }
        Ok(())
    }

    /// Finds which globals are constants, and gives indices to the others.
    fn add_globals(&mut self, reached: &Reached) -> Result<()> {
        let mut others = Vec::new();
        for module in &self.graph.order {
            let code = &self.graph.modules[*module];
            for (global, index) in code.globals.iter().zip(code.imported.globals.len()..) {
                let id = (*module, u32::try_from(index)?);
                let start = self.start(id)?;
                match start {
                    Start::Constant(value) if !global.ty.mutable || !reached.written.contains(&id) => {
                        self.global_indices.insert(id, GlobalUse::Constant(value));
                    }
                    _ => others.push((id, start)),
                }
            }
        }
        // All start values are known by now.
        for (id, start) in others {
            let index = u32::try_from(self.start_values.len() + self.globals.len())?;
            self.global_indices.insert(id, GlobalUse::Index(index));
            self.globals.push((id, start));
        }
        Ok(())
    }

    /// What the global `id` starts with. Its initializer may only use globals
    /// that do not change, and that come from earlier modules.
    fn start(&mut self, (module, index): InModule) -> Result<Start> {
        let graph = self.graph;
        let code = &graph.modules[module];
        let global = code
            .globals
            .get((index as usize).wrapping_sub(code.imported.globals.len()))
            .context("an index out of range")?;
        let mut of_tenant = None;
        let mut known = |index: u32| -> Result<Option<Constant>> {
            match graph.in_module(module, ExternalKind::Global, index)? {
                Origin::Module(module, _, index) => match self.global_indices.get(&(module, index)) {
                    Some(GlobalUse::Constant(value)) => Ok(Some(*value)),
                    _ => bail!("a global starts with one that changes"),
                },
                Origin::Tenant(name) => {
                    of_tenant = Some(name);
                    Ok(None)
                }
                Origin::Canonical(_) => bail!("a global is a function"),
            }
        };
        let value = evaluate(&global.init_expr, &mut known)?;
        match (value, of_tenant) {
            (Some(value), None) => Ok(Start::Constant(value)),
            (None, Some(name)) => {
                // Only as the whole initializer is it what `split` wrote.
                let mut operators = global.init_expr.get_operators_reader();
                operators.read()?;
                ensure!(operators.is_end_then_eof(), "a global starts with a computed start value");
                let place = self.start_values.iter().position(|known| *known == name);
                let place = place.unwrap_or_else(|| {
                    self.start_values.push(name);
                    self.start_values.len() - 1
                });
                Ok(Start::OfTenant(u32::try_from(place)?))
            }
            _ => bail!("a global starts with a value that is not known"),
        }
    }

    /// The merged module's index of a type, which is added if it is new.
    pub(crate) fn add_type(&mut self, function: &FuncType) -> Result<u32> {
        if let Some(index) = self.type_indices.get(function) {
            return Ok(*index);
        }
        let index = u32::try_from(self.types.len())?;
        self.types.push(function.clone());
        self.type_indices.insert(function.clone(), index);
        Ok(index)
    }

    /// The merged module's index of a function.
    pub(crate) fn function(&self, origin: Origin<'a>) -> Result<u32> {
        match origin {
            Origin::Module(module, ExternalKind::Func, index) => self.function_indices.get(&(module, index)),
            Origin::Canonical(index) => self.import_indices.get(&index),
            _ => None,
        }
        .copied()
        .context("a function that is not there")
    }

    /// What stands for the global `index` of `module`.
    pub(crate) fn global(&self, module: usize, index: u32) -> Result<GlobalUse> {
        match self.graph.in_module(module, ExternalKind::Global, index)? {
            Origin::Module(module, _, index) => {
                self.global_indices.get(&(module, index)).copied().context("a global that is not there")
            }
            Origin::Tenant(name) => {
                let place = self.start_values.iter().position(|known| *known == name);
                let place = place.context("a start value that no global starts with")?;
                Ok(GlobalUse::Index(u32::try_from(place)?))
            }
            Origin::Canonical(_) => bail!("a global is a function"),
        }
    }

    /// The merged module's index of the table `index` of `module`.
    pub(crate) fn table(&self, module: usize, index: u32) -> Result<u32> {
        match self.graph.in_module(module, ExternalKind::Table, index)? {
            Origin::Module(module, _, index) => self.table_indices.get(&(module, index)).copied(),
            _ => None,
        }
        .context("a table that is not there")
    }

    /// The merged module's index of the element segment `index` of `module`.
    pub(crate) fn element(&self, module: usize, index: u32) -> Result<u32> {
        let base = self.element_bases.get(&module).context("a module that is not there")?;
        base.checked_add(index).context("an index out of range")
    }
}

/// Refuses a module that the merged one could not stand for.
fn check(module: &CoreModule<'_>) -> Result<()> {
    ensure!(!module.has_start, "it has a start function");
    ensure!(module.memories.is_empty() && module.imported.memories.len() <= 1, "it has a memory of its own");
    ensure!(module.data.as_ref().is_none_or(|data| data.count() == 0), "it has data");
    for table in &module.tables {
        ensure!(matches!(table.init, TableInit::RefNull) && !table.ty.table64, "it has an unusual table");
    }
    for element in &module.elements {
        ensure!(matches!(element.items, ElementItems::Functions(_)), "it has computed elements");
        ensure!(!matches!(element.kind, ElementKind::Passive), "it has passive elements");
    }
    Ok(())
}

/// What can be reached.
struct Reached {
    functions: HashSet<InModule>,
    /// Functions of the host, each with a module that imports it and the
    /// index that it has there.
    host: HashMap<u32, InModule>,
    /// Globals that code writes.
    written: HashSet<InModule>,
    grows_tables: bool,
}

impl Reached {
    /// Follows calls and references from `roots` and from the elements of
    /// tables.
    fn from(graph: &Graph<'_>, roots: &[Origin<'_>]) -> Result<Reached> {
        let mut reached = Reached {
            functions: HashSet::new(),
            host: HashMap::new(),
            written: HashSet::new(),
            grows_tables: false,
        };
        let mut to_read = Vec::new();
        for root in roots {
            match root {
                Origin::Module(module, ExternalKind::Func, index) => to_read.push((*module, *index)),
                _ => bail!("an export that is not a function of a module"),
            }
        }
        for module in &graph.order {
            for element in &graph.modules[*module].elements {
                if let ElementItems::Functions(items) = &element.items {
                    for function in items.clone() {
                        to_read.push((*module, function?));
                    }
                }
            }
        }
        while let Some((user, index)) = to_read.pop() {
            match graph.in_module(user, ExternalKind::Func, index)? {
                Origin::Module(module, _, index) => {
                    ensure!(
                        graph.order.contains(&module),
                        "module {user} uses one that is left out or comes later"
                    );
                    if reached.functions.insert((module, index)) {
                        reached.read_body(graph, module, index, &mut to_read)?;
                    }
                }
                Origin::Canonical(function) => {
                    reached.host.entry(function).or_insert((user, index));
                }
                Origin::Tenant(_) => bail!("a function of the tenant"),
            }
        }
        Ok(reached)
    }

    fn read_body(
        &mut self,
        graph: &Graph<'_>,
        module: usize,
        index: u32,
        to_read: &mut Vec<InModule>,
    ) -> Result<()> {
        let code = &graph.modules[module];
        let body = code
            .bodies
            .get((index as usize).wrapping_sub(code.imported.functions.len()))
            .context("a function without a body")?;
        let mut operators = body.get_operators_reader()?;
        while !operators.eof() {
            match operators.read()? {
                Operator::Call { function_index }
                | Operator::ReturnCall { function_index }
                | Operator::RefFunc { function_index } => to_read.push((module, function_index)),
                Operator::GlobalSet { global_index } => {
                    match graph.in_module(module, ExternalKind::Global, global_index)? {
                        Origin::Module(module, _, index) => {
                            self.written.insert((module, index));
                        }
                        _ => bail!("code writes a start value"),
                    }
                }
                Operator::TableGrow { .. } => self.grows_tables = true,
                _ => {}
            }
        }
        Ok(())
    }
}
