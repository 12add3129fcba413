// Every kernel in the namespace ISA, and the tables of them.
#include "conv_direct.h"
#include "conv_few.h"
#include "conv_point.h"
#include "conv_tiles.h"
#include "conv_wgrad_tiles.h"
#include "maps.h"
#include "peak.h"

#define NAME_(prefix, isa) prefix##isa
#define NAME(prefix, isa) NAME_(prefix, isa)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

namespace unetpp {
namespace ISA {

template <class E>
static const Kernels& table() {
  static const Kernels kernels = {
      TEXT(ISA),        LANES,  HAS_TILES,        conv_winograd<E>, conv_few<E>,      conv_direct<E>,
      conv_point<E>,    conv_tiles,       conv_wgrad<E>,            conv_wgrad_tiles, wgrad_tiles_scratch,
      pack,             pack_tiles,               pool<E>,          pool_backward<E>, head<E>,
      head_backward<E>, norm_sums<E>,             norm_apply<E>,    act_backward<E>,  fused_products};
  return kernels;
}

}  // namespace ISA

const Kernels& NAME(kernels_, ISA)(Element element) {
  return element == Element::kFloat ? ISA::table<float>() : ISA::table<BFloat16>();
}

}  // namespace unetpp
