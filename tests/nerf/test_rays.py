import pytest
import torch

from cbnerf.nerf.rays import (
    Cameras,
    Rays,
    make_cameras,
    make_rays,
    make_sub_pixel_rays,
    make_world_rays,
    ndc_extent,
    project,
)


@pytest.fixture(params=["one lens", "a lens for each view"])
def cameras(request: pytest.FixtureRequest, tiny_cameras: Cameras) -> Cameras:
    """Ten cameras whose principal point is in the middle, or anywhere, with fx != fy."""
    if request.param == "one lens":
        return tiny_cameras
    factors = torch.linspace(0.8, 1.3, 40).view(10, 4)[[3, 8, 0, 5, 9, 1, 7, 2, 6, 4]]
    factors = factors[:, [1, 3, 0, 2]]
    return make_cameras(
        tiny_cameras.camera_to_world, tiny_cameras.intrinsics * factors, tiny_cameras.size
    )


def random_pixels(cameras: Cameras, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views and image points (u, v)."""
    generator = torch.Generator().manual_seed(0)
    height, width = cameras.size
    views = torch.randint(len(cameras.camera_to_world), (number,), generator=generator)
    u, v = torch.rand(2, number, generator=generator)
    return views, u * width, v * height


def points_at(rays: Rays, t: torch.Tensor | float) -> torch.Tensor:
    return rays.origins + torch.as_tensor(t)[..., None] * rays.directions


def from_ndc(points: torch.Tensor, cameras: Cameras) -> torch.Tensor:
    """World points, by solving NeRF's appendix C for them."""
    scale_x, scale_y, shift_x, shift_y = cameras.frustum
    z = 2 / (points[..., 2] - 1)
    x = -(points[..., 0] - shift_x) * z / scale_x
    y = -(points[..., 1] - shift_y) * z / scale_y
    return torch.stack([x, y, z], dim=-1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_points_of_a_ray_project_back_to_its_pixel(cameras: Cameras, t: float):
    views, u, v = random_pixels(cameras, 100)
    world = from_ndc(points_at(make_rays(cameras, views, u, v), t), cameras)
    poses = cameras.camera_to_world[views]
    x, y, z = ((world - poses[..., 3])[:, None] @ poses[..., :3])[:, 0].unbind(-1)
    assert (z < 0).all()  # in front of the camera
    fx, fy, cx, cy = cameras.intrinsics[views].unbind(-1)
    torch.testing.assert_close(cx - fx * x / z, u, **CLOSE)
    torch.testing.assert_close(cy + fy * y / z, v, **CLOSE)


def test_ndc_and_world_are_inverse(cameras: Cameras):
    """A point of a ray, taken back to the world, is seen at the pixel that the ray went through."""
    u, v = torch.tensor([3.5, 40.0, 60.5]), torch.tensor([2.5, 20.0, 47.0])
    for view in (0, 4):
        rays = make_rays(cameras, torch.full((3,), view), u, v)
        for t in (0.0, 0.3, 0.9):
            points = from_ndc(rays.origins + t * rays.directions, cameras)
            torch.testing.assert_close(points[:, 2], torch.full((3,), -1 / (1 - t)))
            seen = project(points, cameras, view)
            torch.testing.assert_close(seen, torch.stack([u, v], dim=1), atol=1e-3, rtol=0)


CLOSE = {"atol": 5e-3, "rtol": 1e-4}  # pixels; far points come from 1 - t in float32


def test_a_world_ray_is_projected_to_the_pixel_that_it_went_through(cameras: Cameras):
    u, v = torch.tensor([0.0, 13.25, 64.0]), torch.tensor([48.0, 31.5, 0.0])
    for view in range(10):
        rays = make_world_rays(cameras, torch.full((3,), view), u, v)
        for depth in (0.5, 1.0, 40.0):
            seen = project(points_at(rays, depth), cameras, view)
            torch.testing.assert_close(seen, torch.stack([u, v], dim=1), atol=1e-3, rtol=0)


def test_a_pixel_is_where_the_camera_matrix_says():
    """K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] of a camera at the origin, with y and z turned."""
    camera = make_cameras(torch.eye(3, 4)[None], torch.tensor([[50.0, 40.0, 10.0, 30.0]]), (48, 64))
    matrix = torch.tensor([[50.0, 0.0, 10.0], [0.0, 40.0, 30.0], [0.0, 0.0, 1.0]])
    points = torch.tensor([[0.3, -0.2, -1.0], [2.0, 1.0, -4.0], [-0.4, 0.5, -2.0]])
    seen = points * torch.tensor([1.0, -1.0, -1.0]) @ matrix.T
    torch.testing.assert_close(project(points, camera, 0), seen[:, :2] / seen[:, 2:])


def test_a_crop_moves_the_principal_point_and_no_ray(cameras: Cameras):
    shift = torch.tensor([0.0, 0.0, 7.0, 3.0])
    cropped = make_cameras(cameras.camera_to_world, cameras.intrinsics - shift, (45, 57))
    views, u, v = random_pixels(cropped, 50)
    rays = make_world_rays(cropped, views, u, v)
    torch.testing.assert_close(rays, make_world_rays(cameras, views, u + 7, v + 3))


def test_metric_depth_is_one_over_one_minus_t(cameras: Cameras):
    rays = make_rays(cameras, *random_pixels(cameras, 5))
    for t in (0.0, 0.25, 0.5, 0.8):
        depth = -from_ndc(points_at(rays, t), cameras)[:, 2]
        torch.testing.assert_close(depth, torch.full_like(depth, 1 / (1 - t)))


def test_rays_start_on_the_near_plane_and_end_at_infinity(cameras: Cameras):
    rays = make_rays(cameras, *random_pixels(cameras, 50))
    torch.testing.assert_close(rays.origins[:, 2], -torch.ones(50))
    torch.testing.assert_close(rays.directions[:, 2], torch.full((50,), 2.0))


def test_the_central_camera_sees_the_cube(cameras: Cameras):
    height, width = cameras.size
    median = cameras.intrinsics.median(0).values[None]
    camera = cameras._replace(camera_to_world=torch.eye(3, 4)[None], intrinsics=median)
    corner = make_rays(camera, torch.zeros(1, dtype=torch.int64), *torch.tensor([[width], [0.0]]))
    for t in (0.0, 0.7, 1.0):
        torch.testing.assert_close(points_at(corner, t), torch.tensor([[1.0, 1.0, 2 * t - 1]]))


@pytest.mark.parametrize("scale", [2, 3])
def test_sub_pixel_rays_of_an_upright_camera_average_to_the_pixel_centre(
    cameras: Cameras, scale: int
):
    position = torch.tensor([[0.2], [-0.1], [0.05]])
    camera = cameras._replace(camera_to_world=torch.cat([torch.eye(3), position], 1)[None])
    views, rows, columns = torch.tensor([[0, 0], [3, 7], [0, 11]])
    every = torch.arange(scale**2).expand(2, -1)
    rays = make_sub_pixel_rays(camera, views, rows, columns, scale, every)
    middle = make_rays(camera, views, (columns + 0.5) * scale, (rows + 0.5) * scale)
    torch.testing.assert_close(rays.origins.mean(1), middle.origins)
    torch.testing.assert_close(rays.directions.mean(1), middle.directions)


def test_sub_pixels_are_numbered_row_by_row(cameras: Cameras):
    views, rows, columns = torch.tensor([[1, 4], [3, 0], [5, 2]])
    chosen = torch.tensor([[4, 0, 5], [1, 3, 2]])
    rays = make_sub_pixel_rays(cameras, views, rows, columns, 3, chosen)
    for pixel in range(2):
        for sub_ray, number in enumerate(chosen[pixel].tolist()):
            down, right = divmod(number, 3)
            u, v = 3 * columns[pixel] + right + 0.5, 3 * rows[pixel] + down + 0.5
            expected = make_rays(cameras, views[pixel], u, v)
            torch.testing.assert_close(rays.origins[pixel, sub_ray], expected.origins)
            torch.testing.assert_close(rays.directions[pixel, sub_ray], expected.directions)


def test_ndc_extent_encloses_all_rays_tightly(cameras: Cameras):
    extent = ndc_extent(cameras)
    rays = make_rays(cameras, *random_pixels(cameras, 20_000))
    for t in (0.0, 0.5, 1.0):
        reached = points_at(rays, t)[:, :2].abs().amax(0)
        bound = (1 - t) * extent[0] + t * extent[1]
        assert (reached <= bound + 1e-5).all()
        if t != 0.5:
            assert (reached > 0.95 * bound).all()
