// The CPU kernels as `torch.ops.unetpp_fast_cpu`, through PyTorch's stable ABI: one library for every torch >= 2.10 and
// every Python. Here tensors become the structures of kernels.h, and the instruction set is chosen.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "arguments.h"
#include "bindings_conv.h"
#include "features.h"

namespace unetpp {

int threads() {
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return static_cast<int>(count);
}

namespace {

struct Shared {
  void (*body)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
};

void take_all(int64_t, int64_t, void* pointer) {
  Shared& shared = *static_cast<Shared*>(pointer);
  for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) shared.body(shared.context, i);
}

}  // namespace

// One region of PyTorch's pool; a thread that the system takes away delays what it has taken, not the rest.
void parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  Shared shared{body, context, count};
  const int64_t workers = std::min<int64_t>(threads(), count);
  if (workers <= 1)
    take_all(0, 1, &shared);
  else
    torch_parallel_for(0, workers, 1, take_all, &shared);
}

namespace {

using Table = const Kernels& (*)(Element);

Table choose() {
  const char* asked = std::getenv("UNETPP_FAST_ISA");
  const std::string name = asked ? asked : "";
#if defined(__x86_64__)
  const Features cpu;
  if (cpu.avx512 && (name.empty() || name == "avx512")) return kernels_avx512;
  if (cpu.avx2 && name != "plain") return kernels_avx2;
#endif
  return kernels_plain;
}

}  // namespace

const Kernels& kernels(Element element) {
  static const Table chosen = choose();
  return chosen(element);
}

Tiles tiles() {
  static const Tiles found = !kernels().tiles ? Tiles::kPlain : cpu_has_tiles() ? Tiles::kCpu : Tiles::kNone;
  return found;
}

namespace {

int64_t matrix_tiles() { return static_cast<int64_t>(tiles()); }

Pass pass_of(const Tensor& x, const Optional& scale, const Optional& shift, int64_t axes, double slope, int64_t chunk = 1) {
  STD_TORCH_CHECK(axes == 2 || axes == 3, "axes is 2 or 3");
  STD_TORCH_CHECK(chunk > 0, "chunk is a number of pixels");
  Pass pass;
  pass.chunk = chunk;
  pass.images = static_cast<int>(x.size(0));
  pass.axes = static_cast<int>(axes);
  pass.x = map_of(x, element_of(x, "x"), "x", scale, shift);
  pass.slope = static_cast<float>(slope);
  return pass;
}

void check_same(const Map& x, const Map& y, const char* name) {
  check_size(y, x.depth, x.height, x.width, name);
  STD_TORCH_CHECK(x.channels == y.channels, name, " has ", y.channels, " channels, not ", x.channels);
}

void check_pooled(const Map& x, const Map& small, int64_t axes, const char* name) {
  check_size(x, small.depth * (axes == 3 ? 2 : 1), small.height * 2, small.width * 2, "x");
  STD_TORCH_CHECK(x.channels == small.channels, name, " has ", small.channels, " channels, not ", x.channels);
}

void pool(Tensor out, Tensor x, Optional scale, Optional shift, int64_t axes, double slope) {
  Pass pass = pass_of(x, scale, shift, axes, slope);
  pass.y = map_of(out, pass.x.element, "out");
  check_images(out, x, "out");
  check_pooled(pass.x, pass.y, axes, "out");
  if (out.numel()) kernels(pass.x.element).pool(pass);
}

void pool_backward(Tensor gx, Tensor g, Tensor x, Optional scale, Optional shift, int64_t axes, double slope, bool add) {
  Pass pass = pass_of(x, scale, shift, axes, slope);
  pass.y = map_of(gx, pass.x.element, "gx");
  pass.g = map_of(g, pass.x.element, "g");
  pass.add = add;
  check_images(gx, x, "gx");
  check_images(g, x, "g");
  check_same(pass.x, pass.y, "gx");
  check_pooled(pass.x, pass.g, axes, "g");
  if (g.numel()) kernels(pass.x.element).pool_backward(pass);
}

int64_t pixels_of(const Map& x) { return static_cast<int64_t>(x.depth) * x.height * x.width; }

void head(Tensor out, Tensor x, Optional scale, Optional shift, Tensor weight, Tensor bias, double slope, int64_t chunk) {
  Pass pass = pass_of(x, scale, shift, 2, slope, chunk);
  pass.classes = static_cast<int>(weight.size(0));
  pass.weight = values(weight, static_cast<int64_t>(pass.classes) * pass.x.channels, "weight");
  pass.bias = values(bias, pass.classes, "bias");
  pass.y.data = scores(out, pass.x.element, pass.images * pass.classes * pixels_of(pass.x), "out");
  if (out.numel()) kernels(pass.x.element).head(pass);
}

void head_backward(Tensor gx, Tensor sums, Tensor dy, Tensor x, Optional scale, Optional shift, Tensor weight, double slope,
                   bool add, int64_t chunk) {
  Pass pass = pass_of(x, scale, shift, 2, slope, chunk);
  pass.classes = static_cast<int>(weight.size(0));
  pass.weight = values(weight, static_cast<int64_t>(pass.classes) * pass.x.channels, "weight");
  pass.y = map_of(gx, pass.x.element, "gx");
  check_images(gx, x, "gx");
  check_same(pass.x, pass.y, "gx");
  const int64_t pixels = pixels_of(pass.x), chunks = (pixels + chunk - 1) / chunk;
  pass.g.data = scores(dy, pass.x.element, pass.images * pass.classes * pixels, "dy");
  pass.sums = const_cast<float*>(values(sums, pass.images * chunks * pass.classes * (pass.x.channels + 1), "sums"));
  pass.add = add;
  if (x.numel()) kernels(pass.x.element).head_backward(pass);
}

Pass norm_of(const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& inverse, const Tensor& scale,
             const Tensor& shift, double slope, int64_t chunk) {
  Pass pass = pass_of(x, scale, shift, 2, slope, chunk);
  pass.g = map_of(g, pass.x.element, "g");
  check_images(g, x, "g");
  check_same(pass.x, pass.g, "g");
  for (const Tensor* part : {&mean, &inverse}) {
    check_floats(*part, "mean and inverse");
    STD_TORCH_CHECK(part->dim() == 2 && part->size(0) == scale.size(0) && part->size(1) == scale.size(1) &&
                        (part->size(0) == 1 || part->stride(0) == scale.stride(0)) &&
                        (part->size(1) == 1 || part->stride(1) == 1),
                    "mean and inverse must lie as scale does");
  }
  pass.mean = static_cast<const float*>(mean.data_ptr());
  pass.inverse = static_cast<const float*>(inverse.data_ptr());
  return pass;
}

void norm_sums(Tensor sums, Tensor g, Tensor x, Tensor mean, Tensor inverse, Tensor scale, Tensor shift, double slope,
               bool frozen, int64_t chunk) {
  Pass pass = norm_of(g, x, mean, inverse, scale, shift, slope, chunk);
  const int64_t chunks = (pixels_of(pass.x) + chunk - 1) / chunk;
  pass.sums = const_cast<float*>(values(sums, pass.images * chunks * 2 * pass.x.channels, "sums"));
  pass.frozen = frozen;
  if (x.numel()) kernels(pass.x.element).norm_sums(pass);
}

void norm_apply(Tensor g, Tensor x, Tensor mean, Tensor inverse, Tensor scale, Tensor shift, Tensor averages, double slope,
                int64_t chunk) {
  Pass pass = norm_of(g, x, mean, inverse, scale, shift, slope, chunk);
  pass.averages = values(averages, averages.size(0) * 2 * pass.x.channels, "averages");
  STD_TORCH_CHECK(averages.size(0) == 1 || averages.size(0) == pass.images, "averages must be [1 or N, 2, C]");
  pass.averages_image = averages.size(0) > 1 ? 2 * pass.x.channels : 0;
  if (x.numel()) kernels(pass.x.element).norm_apply(pass);
}

void act_backward(Tensor sums, Tensor g, Tensor x, double slope, int64_t chunk) {
  Pass pass = pass_of(x, {}, {}, 2, slope, chunk);
  pass.g = map_of(g, pass.x.element, "g");
  check_images(g, x, "g");
  check_same(pass.x, pass.g, "g");
  const int64_t chunks = (pixels_of(pass.x) + chunk - 1) / chunk;
  pass.sums = const_cast<float*>(values(sums, pass.images * chunks * pass.x.channels, "sums"));
  if (x.numel()) kernels(pass.x.element).act_backward(pass);
}

int64_t lanes() { return kernels().lanes; }

double fused_products(int64_t count) { return kernels().fused_products(count); }

}  // namespace
}  // namespace unetpp

STABLE_TORCH_LIBRARY(unetpp_fast_cpu, library) {
  library.def(
      "conv(Tensor(a!) out, Tensor a, Tensor ua, Tensor? scale_a, Tensor? shift_a, Tensor? b, Tensor? ub, Tensor? scale_b, "
      "Tensor? shift_b, Tensor? bias, Tensor? border, Tensor(b!)? stats, int axes, int taps, int stride, bool phased, "
      "int linear, int way, float slope, int plain, int act, bool add) -> ()");
  library.def(
      "conv_pair(Tensor(a!) out, Tensor(b!) mid, Tensor a, Tensor ua, Tensor? b, Tensor? ub, Tensor? bias, Tensor? border, "
      "Tensor second, Tensor? second_bias, bool phased, int linear, float slope) -> ()");
  library.def("pack(Tensor(a!) out, Tensor weight, int way) -> ()");
  library.def("conv_parts(Tensor out, int inputs, int low_inputs, bool phased, int way) -> int");
  library.def(
      "conv_wgrad(Tensor(a!) result, Tensor(b!) scratch, Tensor a, Tensor? scale, Tensor? shift, Tensor dy, int axes, "
      "bool phased, int way, float slope, int plain) -> ()");
  library.def("wgrad_scratch(Tensor a, Tensor dy, int axes, bool phased) -> int");
  library.def("pool(Tensor(a!) out, Tensor x, Tensor? scale, Tensor? shift, int axes, float slope) -> ()");
  library.def(
      "pool_backward(Tensor(a!) gx, Tensor g, Tensor x, Tensor? scale, Tensor? shift, int axes, float slope, "
      "bool add) -> ()");
  library.def(
      "head(Tensor(a!) out, Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor bias, float slope, "
      "int chunk) -> ()");
  library.def(
      "head_backward(Tensor(a!) gx, Tensor(b!) sums, Tensor dy, Tensor x, Tensor? scale, Tensor? shift, Tensor weight, "
      "float slope, bool add, int chunk) -> ()");
  library.def(
      "norm_sums(Tensor(a!) sums, Tensor(b!) g, Tensor x, Tensor mean, Tensor inverse, Tensor scale, Tensor shift, "
      "float slope, bool frozen, int chunk) -> ()");
  library.def(
      "norm_apply(Tensor(a!) g, Tensor x, Tensor mean, Tensor inverse, Tensor scale, Tensor shift, Tensor averages, "
      "float slope, int chunk) -> ()");
  library.def("act_backward(Tensor(a!) sums, Tensor(b!) g, Tensor x, float slope, int chunk) -> ()");
  library.def("lanes() -> int");
  library.def("matrix_tiles() -> int");
  library.def("fused_products(int count) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(unetpp_fast_cpu, CPU, library) {
  library.impl("conv", TORCH_BOX(&unetpp::conv));
  library.impl("conv_pair", TORCH_BOX(&unetpp::conv_pair));
  library.impl("pack", TORCH_BOX(&unetpp::pack));
  library.impl("conv_parts", TORCH_BOX(&unetpp::conv_parts));
  library.impl("conv_wgrad", TORCH_BOX(&unetpp::conv_wgrad));
  library.impl("wgrad_scratch", TORCH_BOX(&unetpp::wgrad_scratch));
  library.impl("pool", TORCH_BOX(&unetpp::pool));
  library.impl("pool_backward", TORCH_BOX(&unetpp::pool_backward));
  library.impl("head", TORCH_BOX(&unetpp::head));
  library.impl("head_backward", TORCH_BOX(&unetpp::head_backward));
  library.impl("norm_sums", TORCH_BOX(&unetpp::norm_sums));
  library.impl("norm_apply", TORCH_BOX(&unetpp::norm_apply));
  library.impl("act_backward", TORCH_BOX(&unetpp::act_backward));
}

STABLE_TORCH_LIBRARY_IMPL(unetpp_fast_cpu, CompositeExplicitAutograd, library) {
  library.impl("lanes", TORCH_BOX(&unetpp::lanes));
  library.impl("matrix_tiles", TORCH_BOX(&unetpp::matrix_tiles));
  library.impl("fused_products", TORCH_BOX(&unetpp::fused_products));
}
